// What a step of the fused backward kernel is made of: its tiles, products and arithmetic.
#pragma once

#include "../common/fused_relative_position.cuh"
#include "../common/half_block.cuh"
#include "../common/query_sums.cuh"
#include "../common/softmax.cuh"
#include "../common/statistics.cuh"
#include "../common/wgmma_backward.cuh"
#include "backward_fused_finish.cuh"

namespace sparse_attn {

// Packed weights times factors. bfloat16 has the range to round the factors first, which halves the instructions.
template <typename T>
__device__ __forceinline__ uint32_t score_gradient(uint32_t weights, float x, float y) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        uint32_t product;
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(weights), "r"(pack<T>(x, y)));
        return product;
    } else {
        const float2 weight = unpack<T>(weights);
        return pack<T>(weight.x * x, weight.y * y);
    }
}

template <typename T, int kHeadDim, bool kRelativePosition>
struct FusedStep {
    static_assert(kHeadDim <= 128, "two 64-wide chunks per tile");
    static constexpr int kConsumerWarps = 8;
    static constexpr int kThreads = 128 + 32 * kConsumerWarps;
    static constexpr bool kIsWide = kHeadDim > 64;
    static constexpr int kQueries = kIsWide ? 64 : 128;  // per step
    static constexpr int kHalves = kQueries / kHalfBlockTokens;
    static constexpr int kQueryStages = 3;
    static constexpr int kStages = 2;  // of everything else
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kHalfBytes = kHalfBlockTokens * 128;  // of one chunk
    static constexpr int kKeyChunkBytes = kBlockTokens * 128, kQueryChunkBytes = kQueries * 128;
    static constexpr int kKeyBytes = kChunks * kKeyChunkBytes, kQueryBytes = kChunks * kQueryChunkBytes;
    // Column of keys with which their second chunk starts. Where a warpgroup computes dQ from each chunk, that shares out
    // the work evenly, with the sums of a relative position, which are the second warpgroup's.
    static constexpr int kKeySplit = kHeadDim == 96 ? 48 : kHeadDim != 80 ? 64 : kRelativePosition ? 48 : 40;
    // Sums become gradients inside. A relative position leaves no room for that, and narrow heads are slower with it.
    static constexpr bool kFinishes = kIsWide && !kRelativePosition;

    struct PlainStorage {
        alignas(1024) unsigned char key[kStages][kKeyBytes];
        alignas(1024) unsigned char value[kKeyBytes];
        alignas(1024) unsigned char query[kQueryStages][kQueryBytes];
        alignas(1024) unsigned char grad_out[kStages][kQueryBytes];
        alignas(1024) unsigned char grads[kStages][2][kQueryChunkBytes];  // dS, a chunk for each warpgroup's 64 keys
        alignas(16) PairStatistics statistics[kQueryStages][kQueries / 2];
        int half_block[kQueryStages];  // of queries, the step's first: its number over all batch entries and heads
        int work[kStages], steps[kStages];  // of the block of keys; no steps: nobody attends to it
        uint64_t key_full[kStages], key_free[kStages], value_full, value_free;
        uint64_t query_full[kQueryStages], query_free[kQueryStages];
        uint64_t grad_out_full[kStages], grads_full[kStages];
        uint64_t grad_out_free[kStages];  // and the dS of the step before
    };
    using Bias = StepBias<T, kQueries>;
    using Places = KeyPlaceTiles<T>;
    struct BiasedStorage : PlainStorage {
        Places places;
        Bias bias[kStages];  // arrives with the gradients of outputs
        BlockCode key_block[kStages];
    };
    using Finish = QuerySumsToGradients<T, kHeadDim>;
    struct FinishingStorage : PlainStorage {
        typename Finish::Tiles finish_tiles;
        typename Finish::Barriers finish_barriers;
        uint64_t added[kStages];  // all of the dQ of the block of keys
    };
    using Storage =
        std::conditional_t<kFinishes, FinishingStorage, std::conditional_t<kRelativePosition, BiasedStorage, PlainStorage>>;
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // dP^T of the warpgroup's keys.
    static __device__ __forceinline__ void issue_scores(float (&scores)[kQueries / 2], int values, int grad_outs) {
        sparse_attn::issue_scores<T, kHeadDim>(scores, values, kKeyChunkBytes, grad_outs, kQueryChunkBytes);
    }
    // The second chunk of `keys` starts at column kKeySplit. From column 40 of 80 on, a step's 32 bytes lie at byte 48 of the
    // row: the swizzle is of the sum of start and offset, so that they need not be aligned to their size.
    static __device__ __forceinline__ void issue_products(float (&scores)[kQueries / 2], int keys, int queries) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; step++) {
            const int along = step % 4 * kDepthStepAlongRows;
            const int key_along = step < 4 ? along : (kKeyChunkBytes >> 4) + (16 * step - kKeySplit) * kDepthStepAlongRows / 16;
            const uint64_t a = tile_descriptor(keys + key_along);
            const uint64_t b = tile_descriptor(queries + step / 4 * (kQueryChunkBytes >> 4) + along);
            if (step == 0) {
                wgmma_scores<T, kQueries, false>(scores, a, b);
            } else {
                wgmma_scores<T, kQueries, true>(scores, a, b);
            }
        }
    }

    // S^T, plus rel_w / scale if there is a relative position. What that takes from registers is made anew for each step,
    // where there is room for it, before the fence.
    using Factors = uint32_t[2][4];
    static __device__ __forceinline__ void make_factors(Factors& factors, const BackwardParams& params) {
        if constexpr (kRelativePosition) {
            Bias::make_factors(factors, params.inverse_scale);
            pin_operands(factors);
        }
    }
    static __device__ __forceinline__ void issue_logits(float (&scores)[kQueries / 2], int keys, const Storage& storage,
                                                        int query_slot, int slot, const Factors& factors) {
        const int queries = tile_along_rows(storage.query[query_slot]);
        if constexpr (kRelativePosition) {
            const int rel_w = tile_along_rows(storage.bias[slot].rel_w);  // not made between the products
            issue_products(scores, keys, queries);
#pragma unroll
            for (int i = 0; i < 2; i++) wgmma_output<T, kQueries, false>(scores, factors[i], narrow_tile_descriptor(rel_w));
        } else {
            issue_products(scores, keys, queries);
        }
        wgmma_commit();
    }

    // dV += P^T dO, or dK += dS^T Q
    static __device__ __forceinline__ void issue_gradient(float (&gradient)[kHeadDim / 2],
                                                          const uint32_t (&a)[kQueries / 16][4], int queries) {
        issue_output<T, kHeadDim>(gradient, a, queries);
        wgmma_commit();
    }

    // dQ = dS K of a step. The warpgroups share it by queries, or, if there are 64, by chunks of columns. With a relative
    // position, the sums of dS over rows and columns of the tile of keys follow, which then are the second warpgroup's.
    static constexpr __host__ __device__ int key_columns(int warpgroup) {
        return !kIsWide ? kHeadDim : warpgroup == 0 ? kKeySplit : kHeadDim - kKeySplit;
    }
    static constexpr __host__ __device__ bool has_sums(int warpgroup) {
        return kRelativePosition && (!kIsWide || warpgroup == 1);
    }
    static constexpr __host__ __device__ int grad_query_columns(int warpgroup) {
        return key_columns(warpgroup) + (has_sums(warpgroup) ? kPlaceColumns : 0);
    }
    template <int kWarpgroup>
    static __device__ __forceinline__ void issue_grad_query(float (&gradient)[grad_query_columns(kWarpgroup) / 2],
                                                            Storage& storage, int slot, int key_slot) {
        constexpr int kColumns = key_columns(kWarpgroup);
        // A product takes columns past the 64th from a distance that may differ from step to step.
        constexpr bool kSumsFollow = has_sums(kWarpgroup) && kColumns == 64;
        const int grads = tile_along_rows(storage.grads[slot][0] + (kIsWide ? 0 : kWarpgroup * kHalfBytes));
        const unsigned char* const key_tile = storage.key[key_slot] + (kIsWide ? kWarpgroup * kKeyChunkBytes : 0);
        int chunk_bytes = kKeyChunkBytes;
        if constexpr (kSumsFollow) chunk_bytes = int(storage.places.tiles[0] - key_tile);
        const int keys = tile_down_rows(key_tile, chunk_bytes);
#pragma unroll
        for (int step = 0; step < kBlockTokens / 16; step++) {
            constexpr int kIssued = kSumsFollow ? kColumns + kPlaceColumns : kColumns;
            const int down = step * kDepthStepDownRows;
            const int distance = kSumsFollow ? (Places::offset(step) - down) * 65536 : 0;
            const uint64_t a = tile_descriptor(grads + along_grads(step)), b = tile_descriptor(keys + down + distance);
            auto& columns = reinterpret_cast<float(&)[kIssued / 2]>(gradient[0]);
            if (step == 0) {
                wgmma_shared_output<T, kIssued, false>(columns, a, b);
            } else {
                wgmma_shared_output<T, kIssued, true>(columns, a, b);
            }
        }
        if constexpr (has_sums(kWarpgroup) && !kSumsFollow) {
            const int places = tile_down_rows(storage.places.tiles[0], 0);
            auto& sums = reinterpret_cast<float(&)[kPlaceColumns / 2]>(gradient[kColumns / 2]);
#pragma unroll
            for (int step = 0; step < kBlockTokens / 16; step++) {
                const uint64_t a = tile_descriptor(grads + along_grads(step));
                const uint64_t b = tile_descriptor(places + Places::offset(step));
                if (step == 0) {
                    wgmma_shared_output<T, kPlaceColumns, false>(sums, a, b);
                } else {
                    wgmma_shared_output<T, kPlaceColumns, true>(sums, a, b);
                }
            }
        }
        wgmma_commit();
    }
    static constexpr __host__ __device__ int along_grads(int step) {
        return step / 4 * (kQueryChunkBytes >> 4) + step % 4 * kDepthStepAlongRows;
    }

    // `half_block` is the step's first, over all batch entries and heads.
    template <int kWarpgroup>
    static __device__ __forceinline__ void add_grad_query(const BackwardParams& params, int half_block, BlockCode key_block,
                                                          const float (&gradient)[grad_query_columns(kWarpgroup) / 2]) {
        constexpr int kColumns = key_columns(kWarpgroup);
        const int first_group = kIsWide ? kKeySplit / 8 * kWarpgroup : 0;
        if (!kIsWide) half_block += kWarpgroup;
        add_to_query_sums<kHeadDim>(params.grad_query_sums, half_block, first_group,
                                    reinterpret_cast<const float(&)[kColumns / 2]>(gradient[0]));
        if constexpr (has_sums(kWarpgroup)) {
            add_to_place_sums(params, half_block, key_block,
                              reinterpret_cast<const float(&)[kPlaceColumns / 2]>(gradient[kColumns / 2]));
        }
    }

    // Some of what the exponents get beside scores is read before these are there: as much as there are registers for.
    static constexpr int kEarlyOffsets = kIsWide ? 2 : 8;
    static constexpr int kEarlyFours = 4;  // with a relative position
    using EarlyOffsets = std::conditional_t<kRelativePosition, float4[kEarlyFours], float2[kEarlyOffsets]>;
    static __device__ __forceinline__ void read_offsets(EarlyOffsets& early, const Storage& storage, int query_slot,
                                                        int slot) {
        if constexpr (kRelativePosition) {
#pragma unroll
            for (int i = 0; i < kEarlyFours; i++) early[i] = storage.bias[slot].four_offsets(i);
        } else {
            const PairStatistics* const statistics = storage.statistics[query_slot];
#pragma unroll
            for (int i = 0; i < kEarlyOffsets; i++) early[i] = statistics[4 * i + threadIdx.x % 4].offset;
        }
    }

    // exp2(scale_log2 s - L), packed; keys that do not exist get 0.
    static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kQueries / 16][4],
                                                        const float (&scores)[kQueries / 2], EarlyOffsets& early,
                                                        const Storage& storage, int query_slot, int slot, float scale_log2,
                                                        const uint32_t (&exists)[2]) {
        if constexpr (kRelativePosition) {
#pragma unroll
            for (int step = 0; step < kQueries / 16; step++) {
                const float4 four = step < kEarlyFours ? early[step] : storage.bias[slot].four_offsets(step);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 offset = i < 2 ? make_float2(four.x, four.y) : make_float2(four.z, four.w);
                    const float x = exp2_approximate(fmaf(scores[8 * step + 2 * i], scale_log2, -offset.x));
                    const float y = exp2_approximate(fmaf(scores[8 * step + 2 * i + 1], scale_log2, -offset.y));
                    weights[step][i] = pack<T>(x, y) & exists[i % 2];
                }
            }
        } else {
            const PairStatistics* const statistics = storage.statistics[query_slot];
#pragma unroll
            for (int i = 0; i < kQueries / 8; i++) {
                const float2 offset = i < kEarlyOffsets ? early[i] : statistics[4 * i + threadIdx.x % 4].offset;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float x = exp2_approximate(fmaf(scores[4 * i + 2 * j], scale_log2, -offset.x));
                    const float y = exp2_approximate(fmaf(scores[4 * i + 2 * j + 1], scale_log2, -offset.y));
                    weights[i / 2][i % 2 * 2 + j] = pack<T>(x, y) & exists[j];
                }
            }
        }
    }

    // dS^T of the warpgroup's keys goes transposed into a tile of queries, as the product with the keys takes it.
    static __device__ __forceinline__ void stage_grads(unsigned char* tile, const uint32_t (&grads)[kQueries / 16][4]) {
        const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
        const int column_group = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
        const uint32_t address = shared_address(tile) + row * 128 + ((column_group ^ (row % 8)) << 4);
#pragma unroll
        for (int step = 0; step < kQueries / 16; step++) {
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address + step * 2048),
                         "r"(grads[step][0]), "r"(grads[step][1]), "r"(grads[step][2]), "r"(grads[step][3])
                         : "memory");
        }
    }
};

}  // namespace sparse_attn
