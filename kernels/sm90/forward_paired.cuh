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
        int key_block[kStages];
        unsigned warps_done[kStages];
        // Kept here because every register of the main loop counts.
        int query_block;
        int64_t key_list;
        BlockPlace query_place;
    };
    static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two thread blocks must fit in one multiprocessor");

    static __device__ __forceinline__ void load_query(Storage& storage, const ForwardParams& params) {
        barrier_arrive_expect(&storage.query_full, kTileBytes);
        tma_load(storage.query, map_of_block(params.query, params.query_grid, storage.query_block),
                 {0, int(blockIdx.y), storage.query_place.x, storage.query_place.y, int(blockIdx.z)}, &storage.query_full);
    }

    static __device__ __forceinline__ void load_stage(Storage& storage, const ForwardParams& params, int stage,
                                                      int key_block) {
        const int head = blockIdx.y, batch = blockIdx.z;
        const BlockPlace place = place_of_block(params.key_grid, key_block);
        const TileCoordinates at{0, head / params.heads_per_key_head, place.x, place.y, batch};
        const bool has_bias = kRelativePosition && place.is_image;
        storage.key_block[stage] = key_block;
        barrier_arrive_expect(&storage.key_full[stage], kTileBytes + (has_bias ? kBiasBytes : 0));
        tma_load(storage.key[stage], map_of_block(params.key, params.key_grid, key_block), at, &storage.key_full[stage]);
        if constexpr (kRelativePosition) {
            if (has_bias) {
                const int query_block = storage.query_block;
                const BlockPlace& query = storage.query_place;
                tma_load(storage.bias[stage].rel_h, map_of_block(params.rel_h, params.query_grid, query_block),
                         {place.y, head, query.x, query.y, batch}, &storage.key_full[stage]);
                tma_load(storage.bias[stage].rel_w, map_of_block(params.rel_w, params.query_grid, query_block),
                         {place.x, head, query.x, query.y, batch}, &storage.key_full[stage]);
            }
        }
        barrier_arrive_expect(&storage.value_full[stage], kTileBytes);
        tma_load(storage.value[stage], map_of_block(params.value, params.key_grid, key_block), at,
                 &storage.value_full[stage]);
    }

    static __device__ __forceinline__ void query_key_product(float (&logits)[64], uint64_t query, uint64_t key) {
        pin_registers(logits);
        wgmma_fence();
        wgmma_logits<T, kRelativePosition || kMaskedKeys>(logits, query, key);
#pragma unroll
        for (int step = 1; step < kHeadDim / 16; step++) {
            wgmma_logits<T, true>(logits, query + 2 * step, key + 2 * step);
        }
        wgmma_commit();
        wgmma_wait<0>(logits);
    }

    // True in one thread of the last warp that calls this for the stage, with every warp's reads done before.
    static __device__ __forceinline__ bool last_to_leave(Storage& storage, int stage, int lane) {
        if (lane != 0) return false;
        unsigned before;
        asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "r"(shared_address(&storage.warps_done[stage])), "r"(kWarps - 1)
                     : "memory");
        return before == kWarps - 1;
    }

    static __device__ __forceinline__ void run(const ForwardParams& params, Storage& storage) {
        const int lane = threadIdx.x % 32;
        const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);

        const QueryRow query_row = sparse_attn::query_row(params, blockIdx.x, blockIdx.y, blockIdx.z);
        KeyList keys;
        keys.open(params, query_row.list);
        const int first = keys.next(params, query_row.list, 0), second = keys.next(params, query_row.list, 1);
        if (threadIdx.x == 0) {
            storage.query_block = query_row.block;
            storage.key_list = query_row.list;
            storage.query_place = place_of_block(params.query_grid, query_row.block);
            barrier_init(&storage.query_full, 1);
            for (int stage = 0; stage < kStages; stage++) {
                barrier_init(&storage.key_full[stage], 1);
                barrier_init(&storage.value_full[stage], 1);
                storage.warps_done[stage] = 0;
            }
            barrier_init_fence();
            if (keys.count > 0) {
                load_query(storage, params);
                load_stage(storage, params, 0, first);
            }
            if (keys.count > 1) load_stage(storage, params, 1, second);
        }
        __syncthreads();

        OnlineSoftmax softmax;
        float out[kHeadDim / 2];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) out[i] = 0.0f;

        const uint64_t query_tile = descriptor_along_rows(shared_address(storage.query) + warpgroup * 64 * 128);
        if (keys.count > 0) barrier_wait(&storage.query_full, 0);
        for (int i = 0; i < keys.count; i++) {
            const int stage = i % kStages;
            const uint32_t parity = (i / kStages) % 2;

            float logits[64];
            barrier_wait(&storage.key_full[stage], parity);
            const RelativePositionTile<T>* bias = nullptr;
            if constexpr (kRelativePosition) bias = &storage.bias[stage];
            const uint64_t key_tile = descriptor_along_rows(shared_address(storage.key[stage]));
            if constexpr (kRelativePosition || kMaskedKeys) {
                initial_logits<T, kRelativePosition, kMaskedKeys>(logits, params, storage.key_block[stage], blockIdx.z, bias);
            }
            query_key_product(logits, query_tile, key_tile);

            float rescale[2];
            softmax.raise_maximum(logits, params.scale_log2, rescale);
            rescale_rows(out, rescale);
            softmax.exponentiate<0, 16>(logits, params.scale_log2);
            uint32_t weights[8][4];
#pragma unroll
            for (int step = 0; step < 8; step++) pack_weights<T>(logits, step, weights[step]);

            barrier_wait(&storage.value_full[stage], parity);
            const uint64_t value_tile = descriptor_down_rows(shared_address(storage.value[stage]), kTileBytes);
            pin_registers(out);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 8; step++) {
                wgmma_output<T, kHeadDim>(out, weights[step], value_tile + step * (2048 >> 4));
            }
            wgmma_commit();
            wgmma_wait<0>(out);

            const int refill = i + kStages;
            const int refill_block = keys.next(params, storage.key_list, refill);
            if (last_to_leave(storage, stage, lane) && refill < keys.count) load_stage(storage, params, stage, refill_block);
            __syncwarp();
        }

        float inverse[2], log_sum[2];
        softmax.finish(params.scale, inverse, log_sum);
        const int head = blockIdx.y, batch = blockIdx.z;
        const BlockPlace place = storage.query_place;
        write_log_sum(params, place, head, batch, query_row_of_thread(), lane, log_sum);
        unsigned char* rows = storage.query + warpgroup * 64 * 128;
        warpgroup_sync(warpgroup);
        stage_rows<T, kHeadDim>(shared_address(rows), out, inverse, threadIdx.x / 32 % 4, lane);
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (threadIdx.x % 128 == 0) {
            store_rows<kHeadDim>(params, place, storage.query_block, head, batch, warpgroup, rows);
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
