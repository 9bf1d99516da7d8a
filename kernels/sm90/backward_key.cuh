// Gradients of keys and values without atomics, with a relative position or dropout: a thread block owns 64 keys and walks
// over the queries that attend to them.
//
// One warpgroup computes the transposed products K Q^T and V dO^T of 64 keys and 64 queries, so that the weights P^T and
// the gradients dS^T of the logits lie in registers as dV += P^T dO and dK += dS^T Q take them. Nothing overlaps inside
// it beyond its own asynchronous products: three (two for wide heads) such thread blocks share a multiprocessor. The
// first warp also issues the copies.
//
// There are no masks. Queries that do not exist, or see no key, have L = +inf, so that their weights are 0; keys that do
// not exist have rows of their own in dK and dV, which are never stored, and padded ones are stored as 0.
#pragma once

#include "../common/dropout.cuh"
#include "../common/half_block.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/query_list.cuh"
#include "../common/softmax.cuh"
#include "../common/statistics.cuh"
#include "../common/tma.cuh"
#include "../common/wgmma_backward.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kDropout>
struct KeyBackward {
    static_assert(kHeadDim <= 128, "two 64-wide chunks per tile");
    static constexpr int kThreads = 128;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kThreadBlocks = kHeadDim <= 64 && !kDropout ? 3 : 2;  // per multiprocessor
    static constexpr int kStages = kHeadDim <= 64 ? 3 : 2;
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kChunkBytes = kHalfBlockTokens * 128;
    static constexpr int kTileBytes = kChunks * kChunkBytes;

    using Bias = HalfBlockBias<T>;
    struct Nothing {};

    // Half a block of queries.
    struct QueryPlace {
        BlockCode block;
        int half, head;
    };

    struct Storage {
        alignas(1024) unsigned char key[kTileBytes];    // holds its gradient at the end
        alignas(1024) unsigned char value[kTileBytes];  // likewise
        alignas(1024) unsigned char query[kStages][kTileBytes];
        alignas(1024) unsigned char grad_out[kStages][kTileBytes];
        alignas(128) Bias bias[kStages];
        alignas(16) PairStatistics statistics[kStages][kHalfBlockTokens / 2];
        uint64_t key_full, full[kStages], free[kStages];
        std::conditional_t<kDropout, QueryPlace, Nothing> place[kStages];
    };
    static_assert(kThreadBlocks * (sizeof(Storage) + 1024) <= 228 * 1024, "the thread blocks must fit in one multiprocessor");

    // Which keys, of which head.
    struct Place {
        BlockCode block;
        int half, head, batch;
    };

    // Copies are issued by a whole warp.
    static __device__ __forceinline__ void load_keys(Storage& storage, const BackwardParams& params, const Place& place) {
        const TileCoordinates at = half_block_at(params.key_grid, place.block, place.half, place.head, place.batch);
        barrier_arrive_expect(&storage.key_full, 2 * kTileBytes);
        load_chunks<kChunks>(storage.key, kChunkBytes, params.key, place.block, at, &storage.key_full);
        load_chunks<kChunks>(storage.value, kChunkBytes, params.value, place.block, at, &storage.key_full);
    }

    // Walks over the half blocks of queries and fetches one at a time.
    struct Loader {
        QueryList list;
        BlockCode block;
        int half;

        __device__ __forceinline__ void load_step(Storage& storage, const BackwardParams& params, const Place& place,
                                                  int stage) {
            half ^= 1;
            if (half == 0) block = list.next(params);
            uint64_t* full = &storage.full[stage];
            if constexpr (kDropout) {
                if (threadIdx.x % 32 == 0) storage.place[stage] = {block, half, list.head};
                __syncwarp();
            }
            const bool has_bias = part_of(place.block) == kImage && (!kDropout || params.relative_position);
            barrier_arrive_expect(full, 2 * kTileBytes + sizeof(storage.statistics[0]) + (has_bias ? sizeof(Bias) : 0));
            const TileCoordinates at = half_block_at(params.query_grid, block, half, list.head, place.batch);
            load_chunks<kChunks>(storage.query[stage], kChunkBytes, params.query, block, at, full);
            load_chunks<kChunks>(storage.grad_out[stage], kChunkBytes, params.grad_out, block, at, full);
            const int half_block = 2 * block_of_code(params.query_grid, block) + half;
            load_statistics(storage.statistics[stage], params, half_block, list.head, place.batch, full);
            if (has_bias) storage.bias[stage].load(params, block, at, place.block, full);
        }
    };

    // Random words of the rows of weights of two neighbouring queries, whose number is the lane's.
    static __device__ __forceinline__ uint2 dropout_rows_of_lane(const BackwardParams& params, const QueryPlace& query,
                                                                 int batch) {
        const BlockPlace place(params.query_grid, query.block);
        const int any_head = batch * params.query_heads + query.head;
        const int slot = query.half * kHalfBlockTokens + 2 * (threadIdx.x % 32);
        return {dropout_row(params.dropout, any_head, place.token(slot)),
                dropout_row(params.dropout, any_head, place.token(slot + 1))};
    }

    // What needs no list, while the lists are on their way.
    static __device__ __forceinline__ void prepare(const BackwardParams& params, Storage& storage) {
        tma_prefetch_map(&params.query.image);
        tma_prefetch_map(&params.grad_out.image);
        barrier_init(&storage.key_full, 1);
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(&storage.full[stage], 1);
            barrier_init(&storage.free[stage], kWarps);
        }
        barrier_init_fence();
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        const int warp = warp_uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
        const int key_block = blockIdx.x / 2;
        const Place place{warp_uniform(code_of_block(params.key_grid, key_block)), int(blockIdx.x % 2), int(blockIdx.y),
                          int(blockIdx.z)};
        const BlockPlace tokens(params.key_grid, place.block);
        if (!tokens.exists(place.half * kHalfBlockTokens)) return;
        Loader loader;
        if (warp == 0) {
            if (lane == 0) prepare(params, storage);
            __syncwarp();
            // Fetched even if nobody attends to them: waiting for the number of queries would delay all others.
            load_keys(storage, params, place);
            loader.half = 1;
            loader.list.open(params, key_block, place.head, place.batch);
        }
        const int total = 2 * QueryList::length(params, key_block, place.head, place.batch);
        if (part_of(place.block) != kImage || (kDropout && !params.relative_position)) {
            for (Bias& bias : storage.bias) bias.clear();
        }
        __syncthreads();
        await_kernel_before();  // which writes the statistics
        if (warp == 0) {
            for (int stage = 0; stage < kStages && stage < total; stage++) loader.load_step(storage, params, place, stage);
        }

        float grad_key[kHeadDim / 2], grad_value[kHeadDim / 2];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) grad_key[i] = grad_value[i] = 0.0f;
        const int key_tile = tile_along_rows(storage.key), value_tile = tile_along_rows(storage.value);
        const int query_tiles = tile_along_rows(storage.query), query_rows = tile_down_rows(storage.query, kChunkBytes);
        const int grad_out_tiles = tile_along_rows(storage.grad_out);
        const int grad_out_rows = tile_down_rows(storage.grad_out, kChunkBytes);
        constexpr int kStageDistance = kTileBytes >> 4;
        barrier_wait(&storage.key_full, 0);
        int stage = 0;
        uint32_t parity = 0;
        for (int step = 0; step < total; step++) {
            barrier_wait(&storage.full[stage], parity);
            // Reads queue behind those of the products: these are sent ahead of them.
            const PairStatistics* const statistics = storage.statistics[stage];
            const float2 offset = storage.bias[stage].offset_of_lane(statistics, 4 * place.half + warp);
            float weights[32], grads[32];
            wgmma_fence();
            issue_scores<T, kHeadDim>(weights, key_tile, kChunkBytes, query_tiles + stage * kStageDistance, kChunkBytes);
            issue_scores<T, kHeadDim>(grads, value_tile, kChunkBytes, grad_out_tiles + stage * kStageDistance, kChunkBytes);
            // The stage that was left last is refilled in the shade of these products.
            if (warp == 0 && step > 0 && step + kStages - 1 < total) {
                const int left = stage == 0 ? kStages - 1 : stage - 1;
                barrier_wait(&storage.free[left], stage == 0 ? parity ^ 1 : parity);
                loader.load_step(storage, params, place, left);
            }
            wgmma_wait<1>(weights);
            storage.bias[stage].exponentiate(weights, offset, params.scale_log2);
            wgmma_wait<0>(grads);
            uint32_t a_weights[4][4], a_grads[4][4];
            uint2 dropout_rows;
            if constexpr (kDropout) dropout_rows = dropout_rows_of_lane(params, storage.place[stage], place.batch);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float2 delta = statistics[4 * i + lane % 4].delta;
                if constexpr (kDropout) {
                    const int source = 4 * i + lane % 4;
                    const uint32_t rows[2] = {__shfl_sync(0xffffffff, dropout_rows.x, source),
                                              __shfl_sync(0xffffffff, dropout_rows.y, source)};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int slot = place.half * kHalfBlockTokens + 16 * warp + lane / 4 + 8 * (j / 2);
                        const bool kept = is_kept(params.dropout, rows[j % 2], tokens.token(slot));
                        const float factor = kept ? params.dropout.inverse_keep : 0.0f, weight = weights[4 * i + j];
                        grads[4 * i + j] = weight * (grads[4 * i + j] * factor - (j % 2 ? delta.y : delta.x));
                        weights[4 * i + j] = weight * factor;
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        grads[4 * i + j] = weights[4 * i + j] * (grads[4 * i + j] - (j % 2 ? delta.y : delta.x));
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    a_weights[i / 2][i % 2 * 2 + j / 2] = pack<T>(weights[4 * i + j], weights[4 * i + j + 1]);
                    a_grads[i / 2][i % 2 * 2 + j / 2] = pack<T>(grads[4 * i + j], grads[4 * i + j + 1]);
                }
            }
            pin_registers(grad_value);
            pin_registers(grad_key);
            wgmma_fence();
            issue_output<T, kHeadDim>(grad_value, a_weights, grad_out_rows + stage * kStageDistance);
            issue_output<T, kHeadDim>(grad_key, a_grads, query_rows + stage * kStageDistance);
            wgmma_commit();
            wgmma_wait<0>(grad_value);
            pin_registers(grad_key);
            barrier_leave(&storage.free[stage]);
            if (++stage == kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
        end(params, storage, place, tokens, grad_key, grad_value);
    }

    static __device__ __forceinline__ void end(const BackwardParams& params, Storage& storage, const Place& place,
                                               const BlockPlace& tokens, const float (&grad_key)[kHeadDim / 2],
                                               const float (&grad_value)[kHeadDim / 2]) {
        bool kept[2] = {true, true};
        if (params.key_padding != nullptr) {
            const GridParams& grid = params.key_grid;
            const int64_t count = grid.prefix + grid.height * grid.width + grid.suffix;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int slot = place.half * kHalfBlockTokens + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
                if (tokens.exists(slot)) kept[i] = !params.key_padding[place.batch * count + tokens.token(slot)];
            }
        }
        __syncthreads();
        stage_half_block<T, kHeadDim>(storage.key, grad_key, params.scale, kept);
        stage_half_block<T, kHeadDim>(storage.value, grad_value, 1.0f, kept);
        fence_async_proxy();
        __syncthreads();
        if (threadIdx.x != 0) return;
        const GridParams& grid = params.key_grid;
        store_half_block<kChunks>(params.grad_key, grid, place.block, place.half, place.head, place.batch, storage.key,
                                  kChunkBytes);
        store_half_block<kChunks>(params.grad_value, grid, place.block, place.half, place.head, place.batch, storage.value,
                                  kChunkBytes);
        tma_store_wait_read();
    }
};

template <typename T, int kHeadDim, bool kDropout>
__global__ void __launch_bounds__(128, KeyBackward<T, kHeadDim, kDropout>::kThreadBlocks)
    backward_key(const __grid_constant__ BackwardParams params) {
    using Kernel = KeyBackward<T, kHeadDim, kDropout>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
