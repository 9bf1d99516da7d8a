// Gradients of queries and of the relative position, without atomics: a thread block owns 128 queries and walks over the
// keys they attend to.
//
// Two warpgroups of 64 rows recompute the logits S = Q K^T and dP = dO V^T, make dS = P (dP - delta) of them in registers
// and accumulate dQ += dS K. Up to head_dim 64 steps of 64 keys fit two such thread blocks in a multiprocessor, whose
// four warpgroups hide each other's latencies; wider heads take 128 keys at a time and a multiprocessor alone. There is no
// producer warp: the warp that is last to leave a stage refills it.
//
// delta = rowsum(dO O) is found first, from an output that waits in the last stage, and written with the log-sum-exp for
// the kernel of keys and values.
#pragma once

#include "../common/dropout.cuh"
#include "../common/half_block.cuh"
#include "../common/key_list.cuh"
#include "../common/key_offsets.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/relative_position_sums.cuh"
#include "../common/statistics.cuh"
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

    // `step` counts all steps; the key block is the one that it is a part of.
    static __device__ __forceinline__ void load_step(Storage& storage, const BackwardParams& params, int stage,
                                                     BlockCode key_block, int step) {
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
            const BlockCode query_block = warp_uniform(storage.query_block);
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

    static __device__ __forceinline__ void issue_scores(float (&scores)[kKeys / 2], int queries, int keys) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; step++) {
            const int along = step % 4 * kDepthStepAlongRows;
            const uint64_t a = tile_descriptor(queries + step / 4 * (kQueryChunkBytes >> 4) + along);
            const uint64_t b = tile_descriptor(keys + step / 4 * (kKeyChunkBytes >> 4) + along);
            if (step == 0) {
                wgmma_scores<T, kKeys, false>(scores, a, b);
            } else {
                wgmma_scores<T, kKeys, true>(scores, a, b);
            }
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

    // What is known of this thread's two queries before anything is computed: L, and the log-sum-exp's gradient as delta.
    static __device__ __forceinline__ void read_statistics(const BackwardParams& params, BlockCode query_block,
                                                           float (&offset)[2], float (&delta)[2]) {
        const GridParams& grid = params.query_grid;
        const BlockPlace place(grid, query_block);
        const int64_t any_head = int64_t(blockIdx.z) * params.query_heads + blockIdx.y;
        const int64_t first_token = any_head * (grid.prefix + grid.height * grid.width + grid.suffix);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int slot = query_row_of_thread() + 8 * i;
            offset[i] = -INFINITY;
            delta[i] = 0.0f;
            if (place.exists(slot)) {
                const int64_t token = first_token + place.token(slot);
                offset[i] = __ldg(&params.lse[token]) * kLog2E;
                if (params.grad_lse != nullptr) delta[i] = -__ldg(&params.grad_lse[token]);
            }
        }
    }

    // Completes them, and writes them for the kernel of keys and values.
    static __device__ __forceinline__ void find_statistics(const BackwardParams& params, const Storage& storage,
                                                           int query_block, float (&offset)[2], float (&delta)[2]) {
        const int64_t any_head = int64_t(blockIdx.z) * params.query_heads + blockIdx.y;
        const int lane_of_quad = threadIdx.x % 4;
        float* const statistics =
            params.statistics + (any_head * params.query_grid.num_blocks + query_block) * (2 * kBlockTokens);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int slot = query_row_of_thread() + 8 * i;
            float sum = 0.0f;
#pragma unroll
            for (int group = 0; group < 2 * kChunks; group++) {
                const int column_group = group % 2 * 4 + lane_of_quad;
                const int at = group / 2 * kQueryChunkBytes + slot * 128 + ((column_group ^ slot % 8) << 4);
                const uint4 out = *reinterpret_cast<const uint4*>(&storage.stages[kStages - 1].key[at]);
                const uint4 grad = *reinterpret_cast<const uint4*>(&storage.grad_out[at]);
                const uint32_t outs[4] = {out.x, out.y, out.z, out.w}, grads[4] = {grad.x, grad.y, grad.z, grad.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 x = unpack<T>(outs[j]), y = unpack<T>(grads[j]);
                    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
                }
            }
            delta[i] += quad_sum(sum);
            if (offset[i] == -INFINITY) {
                offset[i] = INFINITY;
                delta[i] = 0.0f;
            }
            float* const pair = statistics + slot / 2 * 4 + slot % 2;
            if (lane_of_quad == 0) pair[0] = offset[i];
            if (lane_of_quad == 1) pair[2] = delta[i];
        }
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        let_next_kernel_begin();
        const int warp = warp_uniform(threadIdx.x / 32), warpgroup = warp_uniform(threadIdx.x / 128);
        KeyList keys;
        float offset[2], delta[2];
        {
            const QueryRow row = query_row(params, blockIdx.x, blockIdx.y, blockIdx.z);
            const BlockCode query_block = warp_uniform(code_of_block(params.query_grid, row.block));
            // The queries are fetched even for a row without keys: waiting for its length would delay all others.
            if (warp == 0) {
                if (threadIdx.x == 0) prepare(params, storage);
                __syncwarp();
                load_queries(storage, params, query_block);
            }
            keys.open(params, row.list);
            if (threadIdx.x == 0) {
                storage.query_block = query_block;
                storage.key_list = row.list;
                if constexpr (kRelativePosition) storage.sums.place_at(params, row.block, query_block);
            }
            __syncthreads();
            if (warp > 0 && warp < kStages && warp - 1 < keys.count * kSteps) {
                const BlockCode key_block = keys.next(params, storage.key_list, (warp - 1) / kSteps);
                load_step(storage, params, warp - 1, key_block, warp - 1);
            }
            read_statistics(params, query_block, offset, delta);
            if constexpr (kDropout) {
                if (threadIdx.x < kBlockTokens) {
                    const int token = BlockPlace(params.query_grid, query_block).token(threadIdx.x);
                    const int any_head = blockIdx.z * params.query_heads + blockIdx.y;
                    storage.dropout_rows[threadIdx.x] = dropout_row(params.dropout, any_head, token);
                }
            }
            if constexpr (kRelativePosition) {
                storage.sums.clear_rows();
                if (!kDropout || params.relative_position) storage.sums.clear_columns(params);
                storage.places.fill();
                fence_async_proxy();
            }
            barrier_wait(&storage.query_full, 0);
            find_statistics(params, storage, row.block, offset, delta);
            __syncthreads();
        }
        const int total = keys.count * kSteps;
        if (warp == 0 && kStages - 1 < total) {
            load_step(storage, params, kStages - 1, keys.next(params, storage.key_list, (kStages - 1) / kSteps), kStages - 1);
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
        unsigned gone_before = 0;  // warps that had left the stage before this one when this one left it
        int stage = 0;
        uint32_t parity = 0;
        if (kTakesTurns && warpgroup == 1 && total > 0) give_turn(0);
        for (int step = 0; step < total; step++) {
            Stage& tiles = storage.stages[stage];
            barrier_wait(&storage.full[stage], parity);
            float weights[kKeys / 2], grads[kKeys / 2];
            // Taking turns keeps the warpgroups out of step; wider heads gain nothing by it.
            if constexpr (kTakesTurns) await_turn(warpgroup);
            wgmma_fence();
            issue_scores(weights, query_tile, tile_along_rows(tiles.key));
            issue_scores(grads, grad_out_tile, tile_along_rows(tiles.value));
            if constexpr (kTakesTurns) give_turn(warpgroup ^ 1);
            if (step % kSteps == 0) {
                const int position = step / kSteps + 1;
                key_block = next_block;
                if (position < keys.count) next_block = keys.next(params, storage.key_list, position);
            }
            // The last warp to leave a stage refills it, in the shade of these products.
            const int next_step = step + kStages - 1;
            if (step > 0 && next_step < total && warp_uniform(gone_before) == kWarps - 1) {
                load_step(storage, params, stage == 0 ? kStages - 1 : stage - 1, next_block, next_step);
            }
            const RelativePositionTile<T>* bias = nullptr;
            if constexpr (kRelativePosition) bias = &storage.bias[step / kSteps % 2];
            const int first_slot = step % kSteps * kKeys;
            const KeyOffsets<T, kKeys, kRelativePosition, kMaskedKeys, kDropout> offsets(params, key_block, first_slot, bias,
                                                                                         offset);
            wgmma_wait<1>(weights);
            offsets.exponentiate(weights, params.scale_log2, offset);
            wgmma_wait<0>(grads);
            if constexpr (kDropout) {
                const int row = query_row_of_thread();
                const uint32_t rows[2] = {storage.dropout_rows[row], storage.dropout_rows[row + 8]};
                drop_keys(grads, params.dropout, rows, BlockPlace(params.key_grid, key_block), first_slot);
            }
            uint32_t a[kKeys / 16][4];
#pragma unroll
            for (int i = 0; i < kKeys / 4; i++) {
                const float x = weights[2 * i] * (grads[2 * i] - delta[i % 2]);
                const float y = weights[2 * i + 1] * (grads[2 * i + 1] - delta[i % 2]);
                a[i / 4][i % 4] = pack<T>(x, y);
            }
            const bool has_bias = part_of(key_block) == kImage && (!kDropout || params.relative_position);
            if constexpr (kRelativePosition) {
                if (has_bias) storage.sums.enter_row(params, key_block >> kCodeRowShift, tile_row);
            }
            float sums[12];
            if constexpr (kRelativePosition) storage.sums.begin(sums);
            pin_registers(grad);
            wgmma_fence();
            const int key_rows = tile_down_rows(tiles.key, kKeyChunkBytes);
#pragma unroll
            for (int k = 0; k < kKeys / 16; k++) {
                wgmma_output<T, kHeadDim>(grad, a[k], tile_descriptor(key_rows + k * kDepthStepDownRows));
            }
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
        if (threadIdx.x % 128 == 0) store_rows(params, storage.query_block, warpgroup, rows);
    }

    // What needs no list, while the lists are on their way.
    static __device__ __forceinline__ void prepare(const BackwardParams& params, Storage& storage) {
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

    static __device__ __forceinline__ void store_rows(const BackwardParams& params, BlockCode block, int warpgroup,
                                                      const unsigned char* rows) {
        TileCoordinates at = half_block_at(params.query_grid, block, warpgroup, blockIdx.y, blockIdx.z);
        with_map(params.grad_query, block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; chunk++) {
                at.column = 64 * chunk;
                tma_store(map, rows + chunk * kQueryChunkBytes, at);
            }
        });
        tma_store_commit();
        tma_store_wait_read();
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
