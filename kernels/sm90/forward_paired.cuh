// Forward pass for head_dim up to 64: two small thread blocks share a multiprocessor.
//
// A thread block computes 128 queries with two warpgroups of 64 rows, in the 128 registers per thread that let two of
// them fit. Nothing overlaps inside a warpgroup beyond its own asynchronous products: the four warpgroups of a
// multiprocessor hide each other's softmax, and the two of a thread block take turns at Q K^T, which keeps them out of
// step. There is no producer warp, which would cost those registers: the warp that is last to leave a stage refills it,
// so nobody ever waits for a stage to become free.
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
    static constexpr int kBiasBytes =
        kRelativePosition ? kBlockTokens * (kBiasTileHeight + kBiasTileWidth) * int(sizeof(T)) : 0;

    struct NoBias {};
    using Bias = std::conditional_t<kRelativePosition, RelativePositionTile<T>, NoBias>;

    struct Storage {
        alignas(1024) unsigned char query[kTileBytes];  // holds the output at the end
        alignas(1024) unsigned char key[kStages][kTileBytes];
        alignas(1024) unsigned char value[kStages][kTileBytes];
        Bias bias[kStages];
        uint64_t query_full, key_full[kStages], value_full[kStages];
        unsigned warps_gone[kStages];
        // Kept here because every register of the main loop counts.
        BlockCode query_block;
        int64_t key_list;
    };
    static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two thread blocks must fit in one multiprocessor");

    // Loads are called by a whole warp.
    static __device__ __forceinline__ void load(unsigned char* tile, const TensorMaps& maps, const GridParams& grid,
                                                BlockCode block, int head, uint64_t* full) {
        const TileCoordinates at{0, head, x_of(grid, block), y_of(grid, block), int(blockIdx.z)};
        with_map(maps, block, [&](const CUtensorMap* map) { tma_load(tile, map, at, full); });
    }

    static __device__ __forceinline__ void load_query(Storage& storage, const ForwardParams& params, BlockCode block) {
        barrier_arrive_expect(&storage.query_full, kTileBytes);
        load(storage.query, params.query, params.query_grid, block, blockIdx.y, &storage.query_full);
    }

    static __device__ __forceinline__ void load_key(Storage& storage, const ForwardParams& params, int stage,
                                                    BlockCode query_block, BlockCode key_block) {
        const bool has_bias = kRelativePosition && part_of(key_block) == kImage;
        uint64_t* full = &storage.key_full[stage];
        barrier_arrive_expect(full, kTileBytes + (has_bias ? kBiasBytes : 0));
        load(storage.key[stage], params.key, params.key_grid, key_block, key_head(params), full);
        if constexpr (kRelativePosition) {
            if (!has_bias) return;
            const int query_x = x_of(params.query_grid, query_block), query_y = y_of(params.query_grid, query_block);
            const int head = blockIdx.y, batch = blockIdx.z;
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
        load(storage.value[stage], params.value, params.key_grid, key_block, key_head(params), full);
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

    static __device__ __forceinline__ void issue_weights_value(float (&out)[kHeadDim / 2], const uint32_t (&weights)[8][4],
                                                               int value) {
        pin_registers(out);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 8; step++) {
            wgmma_output<T, kHeadDim>(out, weights[step], tile_descriptor(value + step * kDepthStepDownRows));
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

    static __device__ __forceinline__ void run(const ForwardParams& params, Storage& storage) {
        const int warpgroup = warp_uniform(threadIdx.x / 128);
        KeyList keys;
        {
            const QueryRow row = query_row(params, blockIdx.x, blockIdx.y, blockIdx.z);
            if (threadIdx.x == 0) prepare(params, storage);
            keys.open(params, row.list);
            const BlockCode query_block = warp_uniform(code_of_block(params.query_grid, row.block));
            if (threadIdx.x == 0) {
                storage.query_block = query_block;
                storage.key_list = row.list;
            }
            __syncthreads();
            begin(params, storage, query_block, keys);
        }

        OnlineSoftmax softmax;
        float out[kHeadDim / 2];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) out[i] = 0.0f;

        const int query_tile = tile_along_rows(storage.query + warpgroup * 64 * 128);
        if (keys.count > 0) barrier_wait(&storage.query_full, 0);
        if (warpgroup == 1 && keys.count > 0) give_turn(0);
        unsigned gone_before = 0;  // warps that had left the other stage before this one
        BlockCode key_block = keys.count > 0 ? keys.next(params, storage.key_list, 0) : 0;
        for (int i = 0; i < keys.count; i++) {
            const int stage = i % kStages;
            const uint32_t parity = (i / kStages) % 2;
            const int key_tile = tile_along_rows(storage.key[stage]);
            const int value_tile = tile_down_rows(storage.value[stage], kTileBytes);

            float logits[64];
            barrier_wait(&storage.key_full[stage], parity);
            if constexpr (kRelativePosition || kMaskedKeys) {
                const RelativePositionTile<T>* bias = nullptr;
                if constexpr (kRelativePosition) bias = &storage.bias[stage];
                initial_logits<T, kRelativePosition, kMaskedKeys>(logits, params, key_block, blockIdx.z, bias);
            }
            await_turn(warpgroup);
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
            give_turn(warpgroup ^ 1);

            float rescale[2];
            softmax.raise_maximum(logits, params.scale_log2, rescale);
            rescale_rows(out, rescale);
            uint32_t weights[8][4];
            // In halves: packing frees the registers of logits, and too few at a time would wait for the exponentials.
#pragma unroll
            for (int half = 0; half < 8; half += 4) {
#pragma unroll
                for (int step = half; step < half + 4; step++) softmax.exponentiate(logits, params.scale_log2, step);
#pragma unroll
                for (int step = half; step < half + 4; step++) pack_weights<T>(logits, step, weights[step]);
            }
            barrier_wait(&storage.value_full[stage], parity);
            issue_weights_value(out, weights, value_tile);
            wgmma_wait<0>(out);
            gone_before = leave(storage, stage);
        }

        end(params, storage, softmax, out, warpgroup);
    }

    // What needs no list, while the lists are on their way.
    static __device__ __forceinline__ void prepare(const ForwardParams& params, Storage& storage) {
        tma_prefetch_map(&params.query.image);
        tma_prefetch_map(&params.key.image);
        tma_prefetch_map(&params.value.image);
        tma_prefetch_map(&params.out.image);
        barrier_init(&storage.query_full, 1);
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(&storage.key_full[stage], 1);
            barrier_init(&storage.value_full[stage], 1);
            storage.warps_gone[stage] = 0;
        }
        barrier_init_fence();
    }

    // The first loads, each by a warp of its own: one after the other they would delay a short row noticeably.
    static __device__ __forceinline__ void begin(const ForwardParams& params, Storage& storage, BlockCode query_block,
                                                 KeyList& keys) {
        const int warp = warp_uniform(threadIdx.x / 32);
        if (warp == 0 && keys.count > 0) load_query(storage, params, query_block);
        const int stage = (warp - 1) / 2;
        if (warp == 0 || stage >= kStages || stage >= keys.count) return;
        const BlockCode key_block = keys.next(params, storage.key_list, stage);
        if (warp % 2 == 1) {
            load_key(storage, params, stage, query_block, key_block);
        } else {
            load_value(storage, params, stage, key_block);
        }
    }

    static __device__ __forceinline__ void end(const ForwardParams& params, Storage& storage, OnlineSoftmax& softmax,
                                               const float (&out)[kHeadDim / 2], int warpgroup) {
        const int head = blockIdx.y, batch = blockIdx.z;
        float inverse[2], log_sum[2];
        softmax.finish(params.scale, inverse, log_sum);
        if (params.lse != nullptr) {
            write_log_sum(params, BlockPlace(params.query_grid, storage.query_block), head, batch, query_row_of_thread(), log_sum);
        }
        unsigned char* rows = storage.query + warpgroup * 64 * 128;
        warpgroup_sync(warpgroup);
        stage_rows<T, kHeadDim>(shared_address(rows), out, inverse);
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (threadIdx.x % 128 == 0) {
            store_rows<kHeadDim>(params, storage.query_block, head, batch, warpgroup, rows);
            tma_store_wait_read();
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
