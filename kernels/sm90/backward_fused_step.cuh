// What a step of the fused backward kernel is made of: its tiles, products and arithmetic.
#pragma once

#include "../common/half_block.cuh"
#include "../common/query_sums.cuh"
#include "../common/softmax.cuh"
#include "../common/statistics.cuh"
#include "../common/wgmma_backward.cuh"

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
template <typename T, int kHeadDim>
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

    struct Storage {
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
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // S^T or dP^T of the warpgroup's keys.
    static __device__ __forceinline__ void issue_scores(float (&scores)[kQueries / 2], int keys, int queries) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; step++) {
            const int along = step % 4 * kDepthStepAlongRows;
            const uint64_t a = tile_descriptor(keys + step / 4 * (kKeyChunkBytes >> 4) + along);
            const uint64_t b = tile_descriptor(queries + step / 4 * (kQueryChunkBytes >> 4) + along);
            if (step == 0) {
                wgmma_scores<T, kQueries, false>(scores, a, b);
            } else {
                wgmma_scores<T, kQueries, true>(scores, a, b);
            }
        }
        wgmma_commit();
    }

    // dV += P^T dO, or dK += dS^T Q
    static __device__ __forceinline__ void issue_gradient(float (&gradient)[kHeadDim / 2],
                                                          const uint32_t (&a)[kQueries / 16][4], int queries) {
#pragma unroll
        for (int step = 0; step < kQueries / 16; step++) {
            wgmma_output<T, kHeadDim>(gradient, a[step], tile_descriptor(queries + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    // dQ = dS K of a step. The warpgroups share it by queries, or, if there are 64, by chunks of columns.
    static constexpr __host__ __device__ int grad_query_columns(int warpgroup) {
        return !kIsWide ? kHeadDim : warpgroup == 0 ? 64 : kHeadDim - 64;
    }
    template <int kWarpgroup>
    static __device__ __forceinline__ void issue_grad_query(float (&gradient)[grad_query_columns(kWarpgroup) / 2],
                                                            Storage& storage, int slot, int key_slot) {
        constexpr int kColumns = grad_query_columns(kWarpgroup);
        const int grads = tile_along_rows(storage.grads[slot][0] + (kIsWide ? 0 : kWarpgroup * kHalfBytes));
        const int keys = tile_down_rows(storage.key[key_slot] + (kIsWide ? kWarpgroup * kKeyChunkBytes : 0), kKeyChunkBytes);
#pragma unroll
        for (int step = 0; step < kBlockTokens / 16; step++) {
            const int along = step / 4 * (kQueryChunkBytes >> 4) + step % 4 * kDepthStepAlongRows;
            const uint64_t a = tile_descriptor(grads + along), b = tile_descriptor(keys + step * kDepthStepDownRows);
            if (step == 0) {
                wgmma_shared_output<T, kColumns, false>(gradient, a, b);
            } else {
                wgmma_shared_output<T, kColumns, true>(gradient, a, b);
            }
        }
        wgmma_commit();
    }

    // `half_block` is the step's first, over all batch entries and heads.
    template <int kWarpgroup>
    static __device__ __forceinline__ void add_grad_query(const BackwardParams& params, int half_block,
                                                          const float (&gradient)[grad_query_columns(kWarpgroup) / 2]) {
        const int first_group = kIsWide ? 8 * kWarpgroup : 0;
        if (!kIsWide) half_block += kWarpgroup;
        add_to_query_sums<kHeadDim>(params.grad_query_sums, half_block, first_group, gradient);
    }

    // Some of the offsets L are read before it is the warpgroup's turn: as many as there are registers for.
    static constexpr int kEarlyOffsets = kIsWide ? 2 : 8;
    static __device__ __forceinline__ void read_offsets(float2 (&offsets)[kEarlyOffsets], const PairStatistics* statistics) {
#pragma unroll
        for (int i = 0; i < kEarlyOffsets; i++) offsets[i] = statistics[4 * i + threadIdx.x % 4].offset;
    }

    // exp2(scale_log2 s - L), packed; keys that do not exist get 0.
    static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kQueries / 16][4],
                                                        const float (&scores)[kQueries / 2],
                                                        const float2 (&early_offsets)[kEarlyOffsets],
                                                        const PairStatistics* statistics, float scale_log2,
                                                        const uint32_t (&exists)[2]) {
#pragma unroll
        for (int i = 0; i < kQueries / 8; i++) {
            const float2 offset = i < kEarlyOffsets ? early_offsets[i] : statistics[4 * i + threadIdx.x % 4].offset;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float x = exp2_approximate(fmaf(scores[4 * i + 2 * j], scale_log2, -offset.x));
                const float y = exp2_approximate(fmaf(scores[4 * i + 2 * j + 1], scale_log2, -offset.y));
                weights[i / 2][i % 2 * 2 + j] = pack<T>(x, y) & exists[j];
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
