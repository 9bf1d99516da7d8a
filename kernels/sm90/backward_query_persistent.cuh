// Gradients of queries for head_dim above 64, without a relative position or dropout: as backward_query.cuh, but one
// thread block per multiprocessor stays for many blocks of queries.
//
// A producer warp streams queries, keys and values through shared memory, across the borders between blocks of queries,
// so that the next block's first tiles are there when the last one ends; another warp fetches the log-sum-exps. The output
// takes a place among the values, and its delta is found under the first products.
#pragma once

#include "../common/half_block.cuh"
#include "../common/key_list.cuh"
#include "../common/key_offsets.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/query_statistics.cuh"
#include "../common/ring.cuh"
#include "../common/wgmma_backward.cuh"
#include "../common/write_output.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kMaskedKeys>
struct PersistentQueryBackward {
    static_assert(kHeadDim > 64 && kHeadDim <= 128, "two 64-wide chunks per tile; wider heads do not fit in shared memory");
    static constexpr int kConsumerWarps = 8;
    static constexpr int kThreads = 128 + 32 * kConsumerWarps;
    static constexpr int kChunks = 2;
    static constexpr int kChunkBytes = kBlockTokens * 128, kHalfChunkBytes = kHalfBlockTokens * 128;
    static constexpr int kTileBytes = kChunks * kChunkBytes;
    static constexpr int kPlaces = 2;
    static constexpr int kPlaceDistance = kTileBytes >> 4;  // in matrix descriptors
    using Places = Ring<kPlaces>;

    // A block of queries on its way through.
    struct Row {
        BlockCode block;
        int key_count;
    };

    struct Storage {
        alignas(1024) unsigned char query[kPlaces][kTileBytes];  // holds the gradient at the end
        alignas(1024) unsigned char grad_out[kTileBytes];
        alignas(1024) unsigned char key[kPlaces][kTileBytes];
        alignas(1024) unsigned char value[kPlaces][kTileBytes];  // and, after a row's first values, its output
        KnownStatistics known[kPlaces][kBlockTokens];
        uint64_t query_full[kPlaces], query_free[kPlaces], known_full[kPlaces];
        uint64_t grad_out_full, grad_out_free;
        uint64_t key_full[kPlaces], key_free[kPlaces], value_full[kPlaces], value_free[kPlaces];
        BlockCode key_block[kPlaces];
        Row row[kPlaces];
    };
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // The loads are called by the whole producer warp.
    static __device__ __forceinline__ void load(unsigned char* tile, const TensorMaps& maps, const GridParams& grid,
                                                BlockCode block, int head, int batch, uint64_t* full) {
        barrier_arrive_expect(full, kTileBytes);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            TileCoordinates at = half_block_at(grid, block, half, head, batch);
            with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
                for (int chunk = 0; chunk < kChunks; chunk++) {
                    at.column = 64 * chunk;
                    tma_load(tile + chunk * kChunkBytes + half * kHalfChunkBytes, map, at, full);
                }
            });
        }
    }

    static __device__ __forceinline__ void produce(const BackwardParams& params, Storage& storage) {
        const GridParams &query_grid = params.query_grid, &key_grid = params.key_grid;
        const bool is_first = threadIdx.x % 32 == 0;
        Places rows, keys, values;
        uint32_t grad_out_parity = 0;
        for (int index = blockIdx.x; index < RowWork::count(params); index += gridDim.x) {
            const RowWork work(params, index);
            KeyList list;
            const QueryRow row = list.open_row(params, work.rank, work.head, work.entry);
            const BlockCode query_block = warp_uniform(code_of_block(query_grid, row.block));
            barrier_wait(&storage.query_free[rows.place], rows.parity ^ 1);
            if (is_first) storage.row[rows.place] = {query_block, list.count};
            __syncwarp();
            if (list.count == 0) {
                barrier_arrive_expect(&storage.query_full[rows.place], 0);
            } else {
                load(storage.query[rows.place], params.query, query_grid, query_block, work.head, work.entry,
                     &storage.query_full[rows.place]);
            }
            rows.advance();
            const int key_head = work.head / params.heads_per_key_head;
            const auto load_value = [&](const TensorMaps& maps, const GridParams& grid, BlockCode block, int head) {
                barrier_wait(&storage.value_free[values.place], values.parity ^ 1);
                load(storage.value[values.place], maps, grid, block, head, work.entry, &storage.value_full[values.place]);
                values.advance();
            };
            for (int i = 0; i < list.count; i++) {
                const BlockCode key_block = list.next(params, row.list, i);
                barrier_wait(&storage.key_free[keys.place], keys.parity ^ 1);
                if (is_first) storage.key_block[keys.place] = key_block;
                __syncwarp();
                load(storage.key[keys.place], params.key, key_grid, key_block, key_head, work.entry,
                     &storage.key_full[keys.place]);
                keys.advance();
                load_value(params.value, key_grid, key_block, key_head);
                if (i > 0) continue;
                barrier_wait(&storage.grad_out_free, grad_out_parity ^ 1);
                load(storage.grad_out, params.grad_out, query_grid, query_block, work.head, work.entry,
                     &storage.grad_out_full);
                grad_out_parity ^= 1;
                load_value(params.out, query_grid, query_block, work.head);
            }
        }
    }

    // By a warp of its own, whose waiting for memory delays nobody.
    static __device__ __forceinline__ void fetch_known(const BackwardParams& params, Storage& storage) {
        const int lane = threadIdx.x % 32;
        Places rows;
        for (int index = blockIdx.x; index < RowWork::count(params); index += gridDim.x) {
            const RowWork work(params, index);
            const QueryRow row = query_row(params, work.rank, work.head, work.entry);
            const BlockPlace place(params.query_grid, code_of_block(params.query_grid, row.block));
            KnownStatistics known[kBlockTokens / 32];
#pragma unroll
            for (int i = 0; i < kBlockTokens / 32; i++) {
                known[i] = KnownStatistics::of_slot(params, place, lane + 32 * i, work.head, work.entry);
            }
            barrier_wait(&storage.query_free[rows.place], rows.parity ^ 1);
#pragma unroll
            for (int i = 0; i < kBlockTokens / 32; i++) storage.known[rows.place][lane + 32 * i] = known[i];
            barrier_leave(&storage.known_full[rows.place]);
            rows.advance();
        }
    }

    static __device__ __forceinline__ void consume(const BackwardParams& params, Storage& storage) {
        const int warpgroup = warp_uniform(threadIdx.x / 128);
        const bool is_leader = threadIdx.x % 128 == 0;
        const int query_tiles = tile_along_rows(storage.query[0] + warpgroup * kHalfChunkBytes);
        const int grad_out_tile = tile_along_rows(storage.grad_out + warpgroup * kHalfChunkBytes);
        const int key_tiles = tile_along_rows(storage.key[0]), value_tiles = tile_along_rows(storage.value[0]);
        const int key_rows = tile_down_rows(storage.key[0], kChunkBytes);
        if (warpgroup == 1) give_turn(0);
        Places rows, keys, values;
        uint32_t grad_out_parity = 0;
        int stored = -1;  // place whose gradient this thread's last copy may still read
        const auto release_stored = [&] {
            if (is_leader && stored >= 0) {
                tma_store_wait_read();
                barrier_arrive(&storage.query_free[stored]);
                stored = -1;
            }
            __syncwarp();  // products follow
        };

        for (int index = blockIdx.x; index < RowWork::count(params); index += gridDim.x) {
            const RowWork work(params, index);
            barrier_wait(&storage.query_full[rows.place], rows.parity);
            const int count = from_lane_0(storage.row[rows.place].key_count);
            const BlockCode query_block = from_lane_0(storage.row[rows.place].block);
            float offset[2] = {INFINITY, INFINITY}, delta[2] = {0.0f, 0.0f};
            float grad[kHeadDim / 2];
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; i++) grad[i] = 0.0f;

            for (int i = 0; i < count; i++) {
                float weights[kBlockTokens / 2], grads[kBlockTokens / 2];
                barrier_wait(&storage.key_full[keys.place], keys.parity);
                await_turn(warpgroup);  // keeps the warpgroups out of step
                wgmma_fence();
                issue_scores<T, kHeadDim>(weights, query_tiles + rows.place * kPlaceDistance, kChunkBytes,
                                          key_tiles + keys.place * kPlaceDistance, kChunkBytes);
                if (i == 0) barrier_wait(&storage.grad_out_full, grad_out_parity);
                barrier_wait(&storage.value_full[values.place], values.parity);
                wgmma_fence();
                issue_scores<T, kHeadDim>(grads, grad_out_tile, kChunkBytes,
                                          value_tiles + values.place * kPlaceDistance, kChunkBytes);
                give_turn(warpgroup ^ 1);
                const Places value = values;
                values.advance();
                if (i == 0) {
                    release_stored();
                    barrier_wait(&storage.known_full[rows.place], rows.parity);
                    barrier_wait(&storage.value_full[values.place], values.parity);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int slot = query_row_of_thread() + 8 * j;
                        const KnownStatistics known = storage.known[rows.place][slot];
                        const float product =
                            dot_of_rows<T, kChunks>(storage.grad_out, storage.value[values.place], kChunkBytes, slot);
                        offset[j] = known.offset();
                        delta[j] = known.delta(product);
                    }
                    barrier_leave(&storage.value_free[values.place]);
                    values.advance();
                }
                const BlockCode key_block = kMaskedKeys ? from_lane_0(storage.key_block[keys.place]) : 0;
                const KeyOffsets<T, kBlockTokens, false, kMaskedKeys, false> offsets(params, key_block, work.entry, 0, nullptr,
                                                                                     offset);
                wgmma_wait<1>(weights);
                offsets.exponentiate(weights, params.scale_log2, offset);
                // Long complete, but waits do not move over it: the compiler would wait before the exponentials.
                barrier_wait(&storage.key_full[keys.place], keys.parity);
                wgmma_wait<0>(grads);
                barrier_leave(&storage.value_free[value.place]);
                if (i == count - 1) barrier_leave(&storage.grad_out_free);
                uint32_t a[kBlockTokens / 16][4];
                pack_score_gradients<T>(a, weights, grads, delta);
                pin_registers(grad);
                wgmma_fence();
                issue_output<T, kHeadDim>(grad, a, key_rows + keys.place * kPlaceDistance);
                wgmma_commit();
                wgmma_wait<0>(grad);
                barrier_leave(&storage.key_free[keys.place]);
                keys.advance();
            }
            if (count > 0) {
                grad_out_parity ^= 1;
            } else {
                barrier_wait(&storage.known_full[rows.place], rows.parity);  // or that warp may fall behind by a round
            }

            write_statistics(params, block_of_code(params.query_grid, query_block), work.head, work.entry, offset, delta);
            release_stored();
            unsigned char* const staged = storage.query[rows.place] + warpgroup * kHalfChunkBytes;
            const float factor[2] = {params.scale, params.scale};
            warpgroup_sync(warpgroup);
            stage_rows<T, kHeadDim>(shared_address(staged), grad, factor);
            fence_async_proxy();
            warpgroup_sync(warpgroup);
            if (is_leader) {
                store_half_block<kChunks>(params.grad_query, params.query_grid, query_block, warpgroup, work.head, work.entry,
                                          staged, kChunkBytes);
                stored = rows.place;
            }
            rows.advance();
        }
        if (is_leader) tma_store_wait_read();
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        let_next_kernel_begin();
        if (threadIdx.x == 0) {
            if (blockIdx.x == 0) *params.blocks_taken = 0;
            barrier_init(&storage.grad_out_full, 1);
            barrier_init(&storage.grad_out_free, kConsumerWarps);
            for (int place = 0; place < kPlaces; place++) {
                barrier_init(&storage.query_full[place], 1);
                barrier_init(&storage.query_free[place], 2);  // one per consumer warpgroup
                barrier_init(&storage.known_full[place], 1);
                barrier_init(&storage.key_full[place], 1);
                barrier_init(&storage.key_free[place], kConsumerWarps);
                barrier_init(&storage.value_full[place], 1);
                barrier_init(&storage.value_free[place], kConsumerWarps);
            }
            barrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x >= 32 * kConsumerWarps) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            const int warp = warp_uniform(threadIdx.x / 32) - kConsumerWarps;
            if (warp == 0) produce(params, storage);
            if (warp == 1) fetch_known(params, storage);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
            consume(params, storage);
        }
    }
};

template <typename T, int kHeadDim, bool kMaskedKeys>
__global__ void __launch_bounds__(384, 1) backward_query_persistent(const __grid_constant__ BackwardParams params) {
    using Kernel = PersistentQueryBackward<T, kHeadDim, kMaskedKeys>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
