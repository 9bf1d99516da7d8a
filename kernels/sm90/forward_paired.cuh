// Forward pass for head_dim up to 64: two small thread blocks share a multiprocessor.
//
// A thread block computes 128 queries with two warpgroups of 64 rows, in the 128 registers per thread that let two of
// them fit. Nothing overlaps inside a warpgroup beyond its own asynchronous products: four independent warpgroups per
// multiprocessor hide each other's softmax. There is no producer warp, which would cost those registers: the warp that
// is last to leave a stage refills it, so nobody ever waits for a stage to become free.
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
        BlockCode key_block[kStages];
        unsigned warps_gone[kStages];
        // Kept here because every register of the main loop counts.
        BlockCode query_block;
        int key_head;
        int64_t key_list;
    };
    static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two thread blocks must fit in one multiprocessor");

    // The loads are called by a whole warp.
    static __device__ __forceinline__ void load_query(Storage& storage, const ForwardParams& params, BlockCode block) {
        const GridParams& grid = params.query_grid;
        const TileCoordinates at{0, int(blockIdx.y), x_of(grid, block), y_of(grid, block), int(blockIdx.z)};
        barrier_arrive_expect(&storage.query_full, kTileBytes);
        with_map(params.query, block,
                 [&](const CUtensorMap* map) { tma_load(storage.query, map, at, &storage.query_full); });
    }

    static __device__ __forceinline__ void load_stage(Storage& storage, const ForwardParams& params, int stage,
                                                      BlockCode key_block) {
        const int x = x_of(params.key_grid, key_block), y = y_of(params.key_grid, key_block), batch = blockIdx.z;
        const TileCoordinates at{0, warp_uniform(storage.key_head), x, y, batch};
        const bool has_bias = kRelativePosition && part_of(key_block) == kImage;
        if (kRelativePosition || kMaskedKeys) storage.key_block[stage] = key_block;
        uint64_t* key_full = &storage.key_full[stage];
        uint64_t* value_full = &storage.value_full[stage];
        barrier_arrive_expect(key_full, kTileBytes + (has_bias ? kBiasBytes : 0));
        with_map(params.key, key_block, [&](const CUtensorMap* map) { tma_load(storage.key[stage], map, at, key_full); });
        if constexpr (kRelativePosition) {
            if (has_bias) {
                const GridParams& grid = params.query_grid;
                const BlockCode query_block = warp_uniform(storage.query_block);
                const int query_x = x_of(grid, query_block), query_y = y_of(grid, query_block), head = blockIdx.y;
                with_map(params.rel_h, query_block, [&](const CUtensorMap* map) {
                    tma_load(storage.bias[stage].rel_h, map, {y, head, query_x, query_y, batch}, key_full);
                });
                with_map(params.rel_w, query_block, [&](const CUtensorMap* map) {
                    tma_load(storage.bias[stage].rel_w, map, {x, head, query_x, query_y, batch}, key_full);
                });
            }
        }
        barrier_arrive_expect(value_full, kTileBytes);
        with_map(params.value, key_block,
                 [&](const CUtensorMap* map) { tma_load(storage.value[stage], map, at, value_full); });
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

    template <int kBegin, int kEnd>
    static __device__ __forceinline__ void issue_weights_value(float (&out)[kHeadDim / 2], const uint32_t (&weights)[8][4],
                                                               int value) {
        pin_registers(out);
        wgmma_fence();
#pragma unroll
        for (int step = kBegin; step < kEnd; step++) {
            wgmma_output<T, kHeadDim>(out, weights[step], tile_descriptor(value + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    // Counts this warp, which has done all its reads of the stage, as gone. Lane 0 returns how many were gone before.
    static __device__ __forceinline__ unsigned leave(Storage& storage, int stage) {
        unsigned before = 0;
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
            keys.open(params, row.list);
            if (threadIdx.x < 32) begin(params, storage, row, keys);
        }
        __syncthreads();

        OnlineSoftmax softmax;
        float out[kHeadDim / 2];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) out[i] = 0.0f;

        const int query_tile = tile_along_rows(storage.query + warpgroup * 64 * 128);
        if (keys.count > 0) barrier_wait(&storage.query_full, 0);
        unsigned gone_before = 0;  // warps that had left the other stage before this one
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
                initial_logits<T, kRelativePosition, kMaskedKeys>(logits, params, storage.key_block[stage], blockIdx.z, bias);
            }
            issue_query_key(logits, query_tile, key_tile);
            // The last warp to leave a stage refills it, in the shade of this product.
            if (i > 0 && i + 1 < keys.count) {
                const BlockCode refill = keys.next(params, storage.key_list, i + 1);
                if (warp_uniform(gone_before) == kWarps - 1) load_stage(storage, params, stage ^ 1, refill);
            }
            wgmma_wait<0>(logits);

            float rescale[2];
            softmax.raise_maximum(logits, params.scale_log2, rescale);
            rescale_rows(out, rescale);
            uint32_t weights[8][4];
#ifdef SPLIT
            // The first half of the weights is on its way through the tensor cores while the second is computed.
            softmax.exponentiate<0, 8>(logits, params.scale_log2);
#pragma unroll
            for (int step = 0; step < 4; step++) pack_weights<T>(logits, step, weights[step]);
            barrier_wait(&storage.value_full[stage], parity);
            issue_weights_value<0, 4>(out, weights, value_tile);
            softmax.exponentiate<8, 16>(logits, params.scale_log2);
#pragma unroll
            for (int step = 4; step < 8; step++) pack_weights<T>(logits, step, weights[step]);
            issue_weights_value<4, 8>(out, weights, value_tile);
#else
            softmax.exponentiate<0, 16>(logits, params.scale_log2);
#pragma unroll
            for (int step = 0; step < 8; step++) pack_weights<T>(logits, step, weights[step]);
            barrier_wait(&storage.value_full[stage], parity);
            issue_weights_value<0, 8>(out, weights, value_tile);
#endif
            wgmma_wait<0>(out);
            gone_before = leave(storage, stage);
        }

        end(params, storage, softmax, out, warpgroup);
    }

    // First loads, by one warp.
    static __device__ __forceinline__ void begin(const ForwardParams& params, Storage& storage, const QueryRow& row,
                                                 KeyList& keys) {
        const BlockCode query_block = warp_uniform(code_of_block(params.query_grid, row.block));
        if (threadIdx.x == 0) {
            storage.query_block = query_block;
            storage.key_head = blockIdx.y / params.heads_per_key_head;
            storage.key_list = row.list;
            barrier_init(&storage.query_full, 1);
            for (int stage = 0; stage < kStages; stage++) {
                barrier_init(&storage.key_full[stage], 1);
                barrier_init(&storage.value_full[stage], 1);
                storage.warps_gone[stage] = 0;
            }
            barrier_init_fence();
        }
        __syncwarp();
        if (keys.count > 0) {
            load_query(storage, params, query_block);
            load_stage(storage, params, 0, keys.next(params, row.list, 0));
        }
        if (keys.count > 1) load_stage(storage, params, 1, keys.next(params, row.list, 1));
    }

    static __device__ __forceinline__ void end(const ForwardParams& params, Storage& storage, OnlineSoftmax& softmax,
                                               const float (&out)[kHeadDim / 2], int warpgroup) {
        const int head = blockIdx.y, batch = blockIdx.z;
        float inverse[2], log_sum[2];
        softmax.finish(params.scale, inverse, log_sum);
        if (params.lse != nullptr) {
            write_log_sum(params, BlockPlace(params.query_grid, storage.query_block), head, batch, log_sum);
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
