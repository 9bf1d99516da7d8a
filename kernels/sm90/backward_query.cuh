// Gradients of queries and of the relative position, without atomics: a thread block owns 128 queries and walks over the
// keys they attend to.
//
// Two warpgroups of 64 rows recompute the logits S = Q K^T and dP = dO V^T, make dS = P (dP - delta) of them in registers
// and accumulate dQ += dS K. Up to head_dim 64 steps of 64 keys fit two such thread blocks in a multiprocessor, whose
// four warpgroups hide each other's latencies; wider heads, which come here with a relative position or dropout, take 128
// keys at a time and a multiprocessor alone. There is no producer warp: the warp that is last to leave a stage refills it.
//
// delta = rowsum(dO O) is found first, on the diagonal of a product, from an output that waits in the last stage. It is
// written with the log-sum-exp for the kernel of keys and values.
#pragma once

#include "../common/dropout.cuh"
#include "../common/half_block.cuh"
#include "../common/key_list.cuh"
#include "../common/key_offsets.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/query_statistics.cuh"
#include "../common/relative_position_sums.cuh"
#include "../common/wgmma_backward.cuh"
#include "../common/write_output.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
struct QueryBackward {
    static_assert(kHeadDim <= 128, "two 64-wide chunks per tile; wider heads do not fit in shared memory");
    static_assert((kRelativePosition && kMaskedKeys) || !kDropout, "dropout is for the general variant");
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kThreadBlocks = kHeadDim <= 64 ? 2 : 1;  // per multiprocessor
    static constexpr int kStages = kHeadDim <= 64 ? 3 : 2;
    static constexpr int kKeys = kHeadDim <= 64 ? 64 : 128;  // per step
    static constexpr bool kTakesTurns = kHeadDim <= 64;
    static constexpr int kSteps = kBlockTokens / kKeys;      // per block of keys
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kHalfChunkBytes = kHalfBlockTokens * 128;
    static constexpr int kQueryChunkBytes = kBlockTokens * 128, kKeyChunkBytes = kKeys * 128;
    static constexpr int kQueryBytes = kChunks * kQueryChunkBytes, kKeyBytes = kChunks * kKeyChunkBytes;
    static constexpr int kBiasBytes =
        kRelativePosition ? kBlockTokens * (kBiasTileHeight + kBiasTileWidth) * int(sizeof(T)) : 0;

    struct Nothing {};
    using Bias = std::conditional_t<kRelativePosition, RelativePositionTile<T>, Nothing>;
    using Places = std::conditional_t<kRelativePosition, KeyPlaces<T>, Nothing>;
    using Sums = std::conditional_t<kRelativePosition, RelativePositionSums<T>, Nothing>;

    struct Stage {
        alignas(1024) unsigned char key[kKeyBytes];
        alignas(1024) unsigned char value[kKeyBytes];
    };
    static_assert(sizeof(Stage) >= kQueryBytes, "the output waits in a stage");

    struct Storage {
        alignas(1024) unsigned char query[kQueryBytes];  // holds its gradient at the end
        alignas(1024) unsigned char grad_out[kQueryBytes];
        Stage stages[kStages];
        Places places;
        Bias bias[2];  // of the blocks of keys in turn
        Sums sums;
        uint64_t query_full, full[kStages];
        unsigned warps_gone[kStages];
        // Kept here because every register of the main loop counts.
        BlockCode query_block;
        int64_t key_list;
        uint32_t dropout_rows[kDropout ? kBlockTokens : 1];
    };
    static_assert(kThreadBlocks * (sizeof(Storage) + 1024) <= 228 * 1024, "the thread blocks must fit in one multiprocessor");

    // Copies are issued by a whole warp.
    static __device__ __forceinline__ void load_half(unsigned char* tile, int chunk_bytes, const TensorMaps& maps,
                                                     BlockCode block, int half, TileCoordinates at, uint64_t* full) {
        with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; chunk++) {
                at.column = 64 * chunk;
                tma_load(tile + chunk * chunk_bytes + half * kHalfChunkBytes, map, at, full);
            }
        });
    }

    static __device__ __forceinline__ void load_queries(Storage& storage, const BackwardParams& params, BlockCode block) {
        barrier_arrive_expect(&storage.query_full, 3 * kQueryBytes);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const TileCoordinates at = half_block_at(params.query_grid, block, half, blockIdx.y, blockIdx.z);
            uint64_t* full = &storage.query_full;
            load_half(storage.query, kQueryChunkBytes, params.query, block, half, at, full);
            load_half(storage.grad_out, kQueryChunkBytes, params.grad_out, block, half, at, full);
            load_half(storage.stages[kStages - 1].key, kQueryChunkBytes, params.out, block, half, at, full);
        }
    }

    // Called by a whole warp; only the relative position wants to know.
    static __device__ __forceinline__ BlockCode query_block_of(const Storage& storage) {
        return kRelativePosition ? warp_uniform(storage.query_block) : 0;
    }

    // `step` counts all steps; the key block is the one that it is a part of.
    static __device__ __forceinline__ void load_step(Storage& storage, const BackwardParams& params, int stage,
                                                     BlockCode query_block, BlockCode key_block, int step) {
        uint64_t* full = &storage.full[stage];
        const bool has_bias = kRelativePosition && step % kSteps == 0 && part_of(key_block) == kImage &&
                              (!kDropout || params.relative_position);
        barrier_arrive_expect(full, 2 * kKeyBytes + (has_bias ? kBiasBytes : 0));
        int head = blockIdx.y;
        if (params.heads_per_key_head != 1) head /= params.heads_per_key_head;
#pragma unroll
        for (int part = 0; part < kKeys / kHalfBlockTokens; part++) {
            const TileCoordinates at =
                half_block_at(params.key_grid, key_block, kSteps == 1 ? part : step % 2, head, blockIdx.z);
            load_half(storage.stages[stage].key, kKeyChunkBytes, params.key, key_block, part, at, full);
            load_half(storage.stages[stage].value, kKeyChunkBytes, params.value, key_block, part, at, full);
        }
        if constexpr (kRelativePosition) {
            if (!has_bias) return;
            Bias& bias = storage.bias[step / kSteps % 2];
            const int x = x_of(params.key_grid, key_block), y = y_of(params.key_grid, key_block);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                TileCoordinates at = half_block_at(params.query_grid, query_block, half, blockIdx.y, blockIdx.z);
                with_map(params.rel_h, query_block, [&](const CUtensorMap* map) {
                    at.column = y;
                    tma_load(bias.rel_h + half * kHalfBlockTokens * kBiasTileHeight, map, at, full);
                });
                with_map(params.rel_w, query_block, [&](const CUtensorMap* map) {
                    at.column = x;
                    tma_load(bias.rel_w + half * kHalfBlockTokens * kBiasTileWidth, map, at, full);
                });
            }
        }
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

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        let_next_kernel_begin();
        const int warp = warp_uniform(threadIdx.x / 32), warpgroup = warp_uniform(threadIdx.x / 128);
        KeyList keys;
        float offset[2], delta[2];
        {
            const QueryRow row = keys.open_row(params, blockIdx.x, blockIdx.y, blockIdx.z, [&] {
                if (threadIdx.x == 0) prepare(params, storage);
                __syncthreads();
            });
            const BlockCode query_block = warp_uniform(code_of_block(params.query_grid, row.block));
            // The queries are fetched even for a row without keys: waiting for its length would delay all others.
            if (warp == 0) load_queries(storage, params, query_block);
            const BlockPlace place(params.query_grid, query_block);
            KnownStatistics known[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                known[i] = KnownStatistics::of_slot(params, place, query_row_of_thread() + 8 * i, blockIdx.y, blockIdx.z);
            }
            if (warp > 0 && warp < kStages && warp - 1 < keys.count * kSteps) {
                const BlockCode key_block = keys.next(params, row.list, (warp - 1) / kSteps);
                load_step(storage, params, warp - 1, query_block, key_block, warp - 1);
            }
            if (threadIdx.x == 0) {
                storage.query_block = query_block;
                storage.key_list = row.list;
                if constexpr (kRelativePosition) storage.sums.place_at(params, row.block, query_block);
            }
            if constexpr (kDropout) {
                if (threadIdx.x < kBlockTokens) {
                    const int token = BlockPlace(params.query_grid, query_block).token(threadIdx.x);
                    const int any_head = blockIdx.z * params.query_heads + blockIdx.y;
                    storage.dropout_rows[threadIdx.x] = dropout_row(params.dropout, any_head, token);
                }
            }
            if constexpr (kRelativePosition) {
                __syncthreads();
                storage.sums.clear_rows();
                if (!kDropout || params.relative_position) storage.sums.clear_columns(params);
                storage.places.fill();
                fence_async_proxy();
            }
            barrier_wait(&storage.query_full, 0);
            const int half = warpgroup * kHalfChunkBytes;
            float products[2];
            product_of_rows<T, kHeadDim>(products, tile_along_rows(storage.stages[kStages - 1].key + half),
                                         tile_along_rows(storage.grad_out + half), kQueryChunkBytes);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                offset[i] = known[i].offset();
                delta[i] = known[i].delta(products[i]);
            }
            write_statistics(params, row.block, blockIdx.y, blockIdx.z, offset, delta);
            __syncthreads();
        }
        const int total = keys.count * kSteps;
        if (warp == 0 && kStages - 1 < total) {
            const BlockCode block = keys.next(params, storage.key_list, (kStages - 1) / kSteps);
            load_step(storage, params, kStages - 1, query_block_of(storage), block, kStages - 1);
        }

        float grad[kHeadDim / 2];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) grad[i] = 0.0f;
        BlockCode key_block = 0, next_block = total > 0 ? keys.next(params, storage.key_list, 0) : 0;
        static_assert((kStages - 1) / kSteps == 1, "the step to load is of the next block");
        int tile_row = -1;  // of the keys before
        uint32_t seen_columns = 0;

        const int query_tile = tile_along_rows(storage.query + warpgroup * kHalfChunkBytes);
        const int grad_out_tile = tile_along_rows(storage.grad_out + warpgroup * kHalfChunkBytes);
        const int first_keys = tile_along_rows(storage.stages[0].key), first_values = tile_along_rows(storage.stages[0].value);
        const int first_key_rows = tile_down_rows(storage.stages[0].key, kKeyChunkBytes);
        constexpr int kStageDistance = int(sizeof(Stage) >> 4);
        unsigned gone_before = 0;  // warps that had left the stage before this one when this one left it
        int stage = 0;
        uint32_t parity = 0;
        if (kTakesTurns && warpgroup == 1 && total > 0) give_turn(0);
        for (int step = 0; step < total; step++) {
            barrier_wait(&storage.full[stage], parity);
            float weights[kKeys / 2], grads[kKeys / 2];
            // Taking turns keeps the warpgroups out of step; wider heads gain nothing by it.
            if constexpr (kTakesTurns) await_turn(warpgroup);
            wgmma_fence();
            issue_scores<T, kHeadDim>(weights, query_tile, kQueryChunkBytes, first_keys + stage * kStageDistance, kKeyChunkBytes);
            issue_scores<T, kHeadDim>(grads, grad_out_tile, kQueryChunkBytes, first_values + stage * kStageDistance,
                                      kKeyChunkBytes);
            if constexpr (kTakesTurns) give_turn(warpgroup ^ 1);
            if (step % kSteps == 0) {
                const int position = step / kSteps + 1;
                key_block = next_block;
                if (position < keys.count) next_block = keys.next(params, storage.key_list, position);
            }
            // The last warp to leave a stage refills it, in the shade of these products.
            const int next_step = step + kStages - 1;
            if (step > 0 && next_step < total && warp_uniform(gone_before) == kWarps - 1) {
                load_step(storage, params, stage == 0 ? kStages - 1 : stage - 1, query_block_of(storage), next_block, next_step);
            }
            const RelativePositionTile<T>* bias = nullptr;
            if constexpr (kRelativePosition) bias = &storage.bias[step / kSteps % 2];
            const int first_slot = step % kSteps * kKeys;
            const KeyOffsets<T, kKeys, kRelativePosition, kMaskedKeys, kDropout> offsets(params, key_block, blockIdx.z, first_slot,
                                                                                         bias, offset);
            wgmma_wait<1>(weights);
            offsets.exponentiate(weights, params.scale_log2, offset);
            wgmma_wait<0>(grads);
            if constexpr (kDropout) {
                const int row = query_row_of_thread();
                const uint32_t rows[2] = {storage.dropout_rows[row], storage.dropout_rows[row + 8]};
                drop_keys(grads, params.dropout, rows, BlockPlace(params.key_grid, key_block), first_slot);
            }
            uint32_t a[kKeys / 16][4];
            pack_score_gradients<T>(a, weights, grads, delta);
            const bool has_bias = part_of(key_block) == kImage && (!kDropout || params.relative_position);
            if constexpr (kRelativePosition) {
                if (has_bias) storage.sums.enter_row(params, key_block >> kCodeRowShift, tile_row);
            }
            float sums[12];
            if constexpr (kRelativePosition) storage.sums.begin(sums);
            pin_registers(grad);
            wgmma_fence();
            const int key_rows = first_key_rows + stage * kStageDistance;
            issue_output<T, kHeadDim>(grad, a, key_rows);
            if constexpr (kRelativePosition) {
#pragma unroll
                for (int k = 0; k < kKeys / 16; k++) {
                    const int half = kSteps == 1 ? k / 4 : step % 2;
                    const int places = tile_along_rows(storage.places.tiles[half]);
                    wgmma_output<T, 24, false>(sums, a[k], tile_descriptor(places + k % 4 * kDepthStepAlongRows));
                }
            }
            wgmma_commit();
            wgmma_wait<0>(grad);
            gone_before = leave(storage, stage);
            if constexpr (kRelativePosition) {
                pin_registers(sums);
                if (has_bias) storage.sums.take(sums, key_block & (kMaxTileColumns - 1), seen_columns);
            }
            if (++stage == kStages) {
                stage = 0;
                parity ^= 1;
            }
        }

        if constexpr (kRelativePosition) {
            if (!kDropout || params.relative_position) storage.sums.end(params, tile_row, seen_columns);
        }
        unsigned char* rows = storage.query + warpgroup * kHalfChunkBytes;
        const float factor[2] = {params.scale, params.scale};
        warpgroup_sync(warpgroup);
        stage_rows<T, kHeadDim>(shared_address(rows), grad, factor);
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (threadIdx.x % 128 == 0) {
            store_half_block<kChunks>(params.grad_query, params.query_grid, storage.query_block, warpgroup, blockIdx.y,
                                      blockIdx.z, rows, kQueryChunkBytes);
            tma_store_wait_read();
        }
    }

    // What needs no list, while the lists are on their way.
    static __device__ __forceinline__ void prepare(const BackwardParams& params, Storage& storage) {
        if (blockIdx.x + blockIdx.y + blockIdx.z == 0) *params.blocks_taken = 0;
        tma_prefetch_map(&params.query.image);
        tma_prefetch_map(&params.grad_out.image);
        tma_prefetch_map(&params.out.image);
        tma_prefetch_map(&params.key.image);
        tma_prefetch_map(&params.value.image);
        barrier_init(&storage.query_full, 1);
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(&storage.full[stage], 1);
            storage.warps_gone[stage] = 0;
        }
        barrier_init_fence();
    }
};

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
__global__ void __launch_bounds__(256, QueryBackward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>::kThreadBlocks)
    backward_query(const __grid_constant__ BackwardParams params) {
    using Kernel = QueryBackward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
