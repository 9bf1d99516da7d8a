// Forward pass for head_dim up to 64: two small thread blocks share a multiprocessor.
//
// A thread block computes 128 queries with two warpgroups of 64 rows, in the 128 registers per thread that let two of
// them fit. Nothing overlaps inside a warpgroup beyond its own asynchronous products: the four warpgroups of a
// multiprocessor hide each other's softmax. There is no producer warp, which would cost those registers: the warp that is
// last to leave a stage refills it, so nobody ever waits for a stage to become free.
//
// Two things are left out of the softmax. The sums of the weights come out of the product with the values, which have
// eight more columns, of ones. And in bfloat16, whose range is that of float32, weights are relative to the maximum over
// a row's first block of keys; maxima of later blocks are not taken. Where a sum shows that this did not do, the thread
// block starts again and takes them all.
#pragma once

#include "../common/initial_logits.cuh"
#include "../common/key_list.cuh"
#include "../common/softmax.cuh"
#include "../common/wgmma.cuh"
#include "../common/write_output.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys>
struct PairedForward {
    static_assert(kHeadDim <= 64, "one 64-wide chunk per tile; wider heads do not fit twice in registers");
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kStages = 2;
    static constexpr int kTileBytes = kBlockTokens * 128;
    // Columns of ones fit behind a whole chunk of values alone.
    static constexpr bool kSumsInProduct = kHeadDim == 64;
    static constexpr Sums kSums = kSumsInProduct ? Sums::kElsewhere : Sums::kTree;
    static constexpr int kColumns = kHeadDim + (kSumsInProduct ? 8 : 0);
    static constexpr int kOnesBytes = kSumsInProduct ? 2048 : 0;  // of the 16 keys of a step, all ones: any swizzle
    static constexpr int kValueStep = kDepthStepDownRows - (kSumsInProduct ? kDepthStepDownRows << 16 : 0);
    static constexpr int kPartSteps = kSumsInProduct ? 2 : 4;  // steps of 16 keys; sums take registers
    static constexpr bool kAlwaysCareful = !std::is_same_v<T, __nv_bfloat16>;
    static constexpr float kHighestSum = 0x1p64f;  // beyond, the output might overflow
    static constexpr int kBiasBytes =
        kRelativePosition ? kBlockTokens * (kBiasTileHeight + kBiasTileWidth) * int(sizeof(T)) : 0;

    struct NoBias {};
    using Bias = std::conditional_t<kRelativePosition, RelativePositionTile<T>, NoBias>;
    // Tiles hang over windows, so the variants with masked keys have them; without windows that costs a branch per load.
    static constexpr bool kWindows = kMaskedKeys;

    struct Storage {
        alignas(1024) unsigned char query[kTileBytes];  // holds the output at the end
        alignas(1024) unsigned char key[kStages][kTileBytes];
        alignas(1024) unsigned char value[kStages][kTileBytes];
        alignas(1024) unsigned char ones[kSumsInProduct ? kOnesBytes : 16];
        Bias bias[kStages];
        uint64_t query_full, key_full[kStages], value_full[kStages];
        unsigned warps_gone[kStages];
        // Kept here because every register of the main loop counts.
        BlockCode query_block;
        int64_t key_list;
    };
    static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two thread blocks must fit in one multiprocessor");

    // Loads are called by a whole warp.
    static __device__ __forceinline__ void load(unsigned char* tile, const ForwardParams& params, const TensorMaps& maps,
                                                const GridParams& grid, BlockCode block, int head, uint64_t* full) {
        const Origin origin = origin_of<kWindows>(params, blockIdx.z);
        const TileCoordinates at{0, head, origin.x + x_of(grid, block), origin.y + y_of(grid, block), origin.batch};
        with_map(maps, block, [&](const CUtensorMap* map) { tma_load(tile, map, at, full); });
    }

    static __device__ __forceinline__ void load_query(Storage& storage, const ForwardParams& params, BlockCode block) {
        barrier_arrive_expect(&storage.query_full, kTileBytes);
        load(storage.query, params, params.query, params.query_grid, block, blockIdx.y, &storage.query_full);
    }

    static __device__ __forceinline__ void load_key(Storage& storage, const ForwardParams& params, int stage,
                                                    BlockCode query_block, BlockCode key_block) {
        const bool has_bias = kRelativePosition && part_of(key_block) == kImage;
        uint64_t* full = &storage.key_full[stage];
        barrier_arrive_expect(full, kTileBytes + (has_bias ? kBiasBytes : 0));
        load(storage.key[stage], params, params.key, params.key_grid, key_block, key_head(params), full);
        if constexpr (kRelativePosition) {
            if (!has_bias) return;
            const Origin origin = origin_of<kWindows>(params, blockIdx.z);
            const int query_x = origin.x + x_of(params.query_grid, query_block);
            const int query_y = origin.y + y_of(params.query_grid, query_block);
            const int head = blockIdx.y, batch = origin.batch;
            const int x = x_of(params.key_grid, key_block), y = y_of(params.key_grid, key_block);
            with_map(params.rel_h, query_block, [&](const CUtensorMap* map) {
                tma_load(storage.bias[stage].rel_h, map, {y, head, query_x, query_y, batch}, full);
            });
            with_map(params.rel_w, query_block, [&](const CUtensorMap* map) {
                tma_load(storage.bias[stage].rel_w, map, {x, head, query_x, query_y, batch}, full);
            });
        }
    }

    static __device__ __forceinline__ void load_value(Storage& storage, const ForwardParams& params, int stage,
                                                      BlockCode key_block) {
        uint64_t* full = &storage.value_full[stage];
        barrier_arrive_expect(full, kTileBytes);
        load(storage.value[stage], params, params.value, params.key_grid, key_block, key_head(params), full);
    }

    static __device__ __forceinline__ int key_head(const ForwardParams& params) {
        if (params.heads_per_key_head == 1) return blockIdx.y;
        return blockIdx.y / params.heads_per_key_head;
    }

    static __device__ __forceinline__ void issue_query_key(float (&logits)[64], int query, int key) {
        pin_registers(logits);
        wgmma_fence();
        wgmma_logits<T, kRelativePosition || kMaskedKeys>(logits, tile_descriptor(query), tile_descriptor(key));
#pragma unroll
        for (int step = 1; step < kHeadDim / 16; step++) {
            wgmma_logits<T, true>(logits, tile_descriptor(query + step * kDepthStepAlongRows),
                                  tile_descriptor(key + step * kDepthStepAlongRows));
        }
        wgmma_commit();
    }

    // Counts this warp, which has done all its reads of the stage, as gone. Lane 0 returns how many were gone before.
    static __device__ __forceinline__ unsigned leave(Storage& storage, int stage) {
        unsigned before = 0;
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
                         : "=r"(before)
                         : "r"(shared_address(&storage.warps_gone[stage])), "r"(kWarps - 1)
                         : "memory");
        }
        return before;
    }

    // A tile of values as operand, with the ones as its next chunk.
    static __device__ __forceinline__ int value_operand(const Storage& storage, int stage) {
        const unsigned char* tile = storage.value[stage];
        return tile_down_rows(tile, int(storage.ones - tile));
    }

    static __device__ __forceinline__ void run(const ForwardParams& params, Storage& storage) {
        if (lies_outside<kWindows>(params, code_of_block(params.query_grid, blockIdx.x), blockIdx.z)) return;
        const int warpgroup = warp_uniform(threadIdx.x / 128), warp = warp_uniform(threadIdx.x / 32);
        prefetch_maps(params);
        write_ones(storage);
        init_barriers<false>(storage, warp);
        for (bool careful = kAlwaysCareful;;) {
            KeyList keys;
            const QueryRow row = keys.open_row(params, blockIdx.x, blockIdx.y, blockIdx.z);
            const BlockCode query_block = warp_uniform(code_of_block(params.query_grid, row.block));
            if (threadIdx.x == 0) {
                storage.query_block = query_block;
                storage.key_list = row.list;
            }
            begin(params, storage, query_block, keys, warp);
            __syncthreads();

            OnlineSoftmax softmax;
            float out[kColumns / 2];
            if (keys.count > 0) barrier_wait(&storage.query_full, 0);
            attend(params, storage, keys, softmax, out, warpgroup, careful ? keys.count : 1);
            const bool failed = keys.count > 0 && !is_sound(softmax);
            end(params, storage, softmax, out, warpgroup);
            if (kAlwaysCareful) break;
            // The output was written nevertheless, so that nobody waits for the other warpgroup before that.
            if (warp_uniform(__syncthreads_or(failed)) == 0 || careful) break;
            careful = true;
            if (threadIdx.x % 128 == 0) tma_store_wait();
            __syncthreads();
            init_barriers<true>(storage, warp);
        }
        if (threadIdx.x % 128 == 0) tma_store_wait_read();
    }

    // Whether the maxima over the first blocks did for this thread's rows. A sum is at least 1 where a first block has keys.
    static __device__ __forceinline__ bool is_sound(const OnlineSoftmax& softmax) {
        const float *sum = softmax.sum, lowest = kMaskedKeys ? 0.0f : 0.5f;
        return sum[0] <= kHighestSum && sum[1] <= kHighestSum && sum[0] >= lowest && sum[1] >= lowest;
    }

    // Walks over the row's keys, and takes the maximum of the first `raised` blocks.
    static __device__ __forceinline__ void attend(const ForwardParams& params, Storage& storage, KeyList& keys,
                                                  OnlineSoftmax& softmax, float (&out)[kColumns / 2], int warpgroup,
                                                  int raised) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) out[i] = 0.0f;
        const int query_tile = tile_along_rows(storage.query + warpgroup * 64 * 128);
        unsigned gone_before = 0;  // warps that had left the other stage before this one
        BlockCode key_block = keys.count > 0 ? keys.next(params, storage.key_list, 0) : 0;
        for (int i = 0; i < keys.count; i++) {
            const int stage = i % kStages;
            const uint32_t parity = (i / kStages) % 2;
            const int key_tile = tile_along_rows(storage.key[stage]);
            const int value_tile = value_operand(storage, stage);

            float logits[64];
            barrier_wait(&storage.key_full[stage], parity);
            if constexpr (kRelativePosition || kMaskedKeys) {
                const RelativePositionTile<T>* bias = nullptr;
                if constexpr (kRelativePosition) bias = &storage.bias[stage];
                initial_logits<T, kRelativePosition, kMaskedKeys, false>(logits, params, key_block, blockIdx.z, bias);
            }
            issue_query_key(logits, query_tile, key_tile);
            // The last warp to leave a stage refills it, in the shade of this product.
            if (i + 1 < keys.count) {
                key_block = keys.next(params, storage.key_list, i + 1);
                if (i > 0 && warp_uniform(gone_before) == kWarps - 1) {
                    load_key(storage, params, stage ^ 1, warp_uniform(storage.query_block), key_block);
                    load_value(storage, params, stage ^ 1, key_block);
                }
            }
            wgmma_wait<0>(logits);
            // Here, not before the product: the compiler puts packing behind a wait, and would split the softmax.
            barrier_wait(&storage.value_full[stage], parity);

            bool raises = kAlwaysCareful || i < raised;
            if constexpr (kMaskedKeys && !kAlwaysCareful) {
                raises = raises || __any_sync(0xffffffff, !softmax.has_keys(0) || !softmax.has_keys(1));
            }
            if (raises) {
                float rescale[2];
                softmax.raise_maximum(logits, params.scale_log2, rescale);
                rescale_rows(out, rescale);
            }
            // The product of one part of the keys runs while the next part's weights are made.
            uint32_t weights[8][4];
#pragma unroll
            for (int part = 0; part < 8; part += kPartSteps) {
#pragma unroll
                for (int step = part; step < part + kPartSteps; step++) {
                    softmax.template exponentiate<kSums>(logits, params.scale_log2, step);
                    pack_weights<T>(logits, step, weights[step]);
                }
                pin_registers(out);
                wgmma_fence();
#pragma unroll
                for (int step = part; step < part + kPartSteps; step++) {
                    wgmma_output<T, kColumns>(out, weights[step], tile_descriptor(value_tile + step * kValueStep));
                }
                wgmma_commit();
            }
            wgmma_wait<0>(out);
            gone_before = leave(storage, stage);
        }
        if constexpr (kSumsInProduct) {
            softmax.sum[0] = out[kHeadDim / 2];
            softmax.sum[1] = out[kHeadDim / 2 + 2];
        } else {
            softmax.add_up_quad();
        }
    }

    // Each warp makes the barrier of the load that it begins with, and so needs not wait for the others.
    template <bool kAgain>
    static __device__ __forceinline__ void init_barriers(Storage& storage, int warp) {
        static_assert(1 + 2 * kStages <= kWarps, "a warp for each of the first loads");
        uint64_t* barrier = first_barrier(storage, warp);
        if (barrier != nullptr && threadIdx.x % 32 == 0) {
            if (kAgain) barrier_invalidate(barrier);
            barrier_init(barrier, 1);
            barrier_init_fence();
        }
        if (!kAgain && threadIdx.x < kStages) storage.warps_gone[threadIdx.x] = 0;
        __syncwarp();
    }

    static __device__ __forceinline__ uint64_t* first_barrier(Storage& storage, int warp) {
        if (warp == 0) return &storage.query_full;
        const int stage = (warp - 1) / 2;
        if (stage >= kStages) return nullptr;
        return warp % 2 == 1 ? &storage.key_full[stage] : &storage.value_full[stage];
    }

    static __device__ __forceinline__ void prefetch_maps(const ForwardParams& params) {
        const TensorMaps* maps[] = {&params.query, &params.key, &params.value, &params.out};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (threadIdx.x == 32 * i) tma_prefetch_map(&maps[i]->image);
        }
    }

    static __device__ __forceinline__ void write_ones(Storage& storage) {
        if constexpr (kSumsInProduct) {
            const uint32_t pair = pack<T>(1.0f, 1.0f);
            reinterpret_cast<uint2*>(storage.ones)[threadIdx.x] = make_uint2(pair, pair);
            fence_async_proxy();
            static_assert(kOnesBytes == kThreads * sizeof(uint2), "each thread writes 8 bytes");
        }
    }

    // The first loads, each by a warp of its own: one after the other they would delay a short row noticeably.
    static __device__ __forceinline__ void begin(const ForwardParams& params, Storage& storage, BlockCode query_block,
                                                 KeyList& keys, int warp) {
        if (warp == 0) {
            if (keys.count > 0) load_query(storage, params, query_block);
            return;
        }
        const int stage = (warp - 1) / 2;
        if (stage >= kStages || stage >= keys.count) return;
        const BlockCode key_block = keys.next(params, storage.key_list, stage);
        if (warp % 2 == 1) {
            load_key(storage, params, stage, query_block, key_block);
        } else {
            load_value(storage, params, stage, key_block);
        }
    }

    static __device__ __forceinline__ void end(const ForwardParams& params, Storage& storage, OnlineSoftmax& softmax,
                                               const float (&out)[kColumns / 2], int warpgroup) {
        const int head = blockIdx.y, batch = blockIdx.z;
        float inverse[2], log_sum[2];
        softmax.finish(inverse, log_sum);
        if (params.lse != nullptr) {
            const BlockPlace place(params.query_grid, storage.query_block);
            write_log_sum(params, place, head, batch, query_row_of_thread(), log_sum);
        }
        unsigned char* rows = storage.query + warpgroup * 64 * 128;
        warpgroup_sync(warpgroup);
        stage_rows<T, kHeadDim>(shared_address(rows), out, inverse);
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (threadIdx.x % 128 == 0) {
            store_rows<kHeadDim, kWindows>(params, storage.query_block, head, batch, warpgroup, rows);
        }
    }
};

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys>
__global__ void __launch_bounds__(256, 2) forward_paired(const __grid_constant__ ForwardParams params) {
    using Kernel = PairedForward<T, kHeadDim, kRelativePosition, kMaskedKeys>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
