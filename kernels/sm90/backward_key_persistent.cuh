// Gradients of keys and values without a relative position or dropout: as backward_key.cuh, but one thread block per
// multiprocessor stays for many halves of blocks of keys.
//
// Each warpgroup is on its own, with 64 keys at a time and a producer warp that streams keys and queries to it, across the
// borders between halves. Those are handed out by a counter: how many queries attend to them differs. The gradients leave
// through the place of the last queries, while the next keys arrive.
#pragma once

#include "../common/half_block.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/query_list.cuh"
#include "../common/ring.cuh"
#include "../common/softmax.cuh"
#include "../common/statistics.cuh"
#include "../common/tma.cuh"
#include "../common/wgmma_backward.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim>
struct PersistentKeyBackward {
    static_assert(kHeadDim <= 128, "two 64-wide chunks per tile");
    static constexpr int kTeams = kHeadDim <= 64 ? 3 : 2;  // warpgroups that compute
    static constexpr int kThreads = 128 * (kTeams + 1);
    static constexpr int kTeamWarps = 4;
    static constexpr int kStages = kHeadDim <= 64 ? 3 : 2;
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kChunkBytes = kHalfBlockTokens * 128;
    static constexpr int kTileBytes = kChunks * kChunkBytes;
    static constexpr int kStageDistance = kTileBytes >> 4;  // in matrix descriptors
    using Stages = Ring<kStages>;

    // Half a block of keys, and how many halves of blocks of queries attend to it.
    struct Work {
        static constexpr int kNone = 0x7fffffff;  // steps, when there is no more work
        BlockCode block;
        int half, head, batch, steps;
    };

    struct Tiles {
        alignas(1024) unsigned char key[kTileBytes];
        alignas(1024) unsigned char value[kTileBytes];
        alignas(1024) unsigned char query[kStages][kTileBytes];     // the last holds the gradient of the keys at the end
        alignas(1024) unsigned char grad_out[kStages][kTileBytes];  // likewise of the values
    };

    struct State {
        alignas(16) PairStatistics statistics[kStages][kHalfBlockTokens / 2];
        uint64_t key_full, key_free, full[kStages], free[kStages];
        Work work[kStages];
    };

    struct Storage {
        Tiles tiles[kTeams];
        State states[kTeams];
    };
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // Halves of all blocks of keys. Heads follow each other, so that their queries stay in the cache.
    static __host__ __device__ __forceinline__ int work_count(const BackwardParams& params) {
        return 2 * params.key_grid.num_blocks * (params.query_heads / params.heads_per_key_head) * params.batch;
    }
    static int thread_blocks(const BackwardParams& params) { return (work_count(params) + kTeams - 1) / kTeams; }

    // The calls below, up to `produce`, are by a whole producer warp.
    static __device__ __forceinline__ int take(const BackwardParams& params) {
        int taken = 0;
        if (threadIdx.x % 32 == 0) taken = atomicAdd(params.blocks_taken, 1);
        return warp_uniform(taken) + kTeams * gridDim.x;
    }

    static __device__ __forceinline__ void load(unsigned char* tile, const TensorMaps& maps, BlockCode block,
                                                TileCoordinates at, uint64_t* full) {
        with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; chunk++) {
                at.column = 64 * chunk;
                tma_load(tile + chunk * kChunkBytes, map, at, full);
            }
        });
    }

    // Waits for the next stage, and says what it is for.
    static __device__ __forceinline__ void open_stage(State& state, const Stages& stages, const Work& work) {
        barrier_wait(&state.free[stages.place], stages.parity ^ 1);
        if (threadIdx.x % 32 == 0) state.work[stages.place] = work;
        __syncwarp();
    }

    static __device__ __forceinline__ void load_queries(Tiles& tiles, State& state, const BackwardParams& params,
                                                        const Stages& stages, BlockCode block, int half, int head, int batch) {
        const int stage = stages.place;
        uint64_t* const full = &state.full[stage];
        barrier_arrive_expect(full, 2 * kTileBytes + sizeof(state.statistics[0]));
        const TileCoordinates at = half_block_at(params.query_grid, block, half, head, batch);
        load(tiles.query[stage], params.query, block, at, full);
        load(tiles.grad_out[stage], params.grad_out, block, at, full);
        const int half_block = 2 * block_of_code(params.query_grid, block) + half;
        load_statistics(state.statistics[stage], params, half_block, head, batch, full);
    }

    static __device__ __forceinline__ void load_keys(Tiles& tiles, State& state, const BackwardParams& params,
                                                     const Work& work) {
        const TileCoordinates at = half_block_at(params.key_grid, work.block, work.half, work.head, work.batch);
        barrier_arrive_expect(&state.key_full, 2 * kTileBytes);
        load(tiles.key, params.key, work.block, at, &state.key_full);
        load(tiles.value, params.value, work.block, at, &state.key_full);
    }

    static __device__ __forceinline__ void produce(const BackwardParams& params, Tiles& tiles, State& state, int team) {
        const int heads = params.query_heads / params.heads_per_key_head, halves = 2 * params.key_grid.num_blocks;
        Stages stages;
        uint32_t key_parity = 0;
        int index = kTeams * blockIdx.x + team;
        while (index < work_count(params)) {
            const int any_head = index / halves, key_block = index % halves / 2;
            Work work{warp_uniform(code_of_block(params.key_grid, key_block)), index % 2, any_head % heads, any_head / heads, 0};
            index = take(params);
            if (!BlockPlace(params.key_grid, work.block).exists(work.half * kHalfBlockTokens)) continue;
            QueryList list;
            list.open(params, key_block, work.head, work.batch);
            work.steps = 2 * list.total(params);
            if (work.steps == 0) {
                open_stage(state, stages, work);
                barrier_arrive_expect(&state.full[stages.place], 0);
                stages.advance();
                continue;
            }
            BlockCode block = 0;
            for (int step = 0; step < work.steps; step++) {
                if (step % 2 == 0) block = list.next(params);
                open_stage(state, stages, work);
                load_queries(tiles, state, params, stages, block, step % 2, list.head, work.batch);
                stages.advance();
                if (step > 0) continue;
                // After the first queries: their place is free before that of the keys.
                barrier_wait(&state.key_free, key_parity ^ 1);
                load_keys(tiles, state, params, work);
                key_parity ^= 1;
            }
        }
        open_stage(state, stages, {0, 0, 0, 0, Work::kNone});
        barrier_arrive_expect(&state.full[stages.place], 0);
    }

    static __device__ __forceinline__ void consume(const BackwardParams& params, Tiles& tiles, State& state, int team) {
        const int lane = threadIdx.x % 32;
        const bool is_leader = threadIdx.x % 128 == 0;
        const int key_tile = tile_along_rows(tiles.key), value_tile = tile_along_rows(tiles.value);
        const int query_tiles = tile_along_rows(tiles.query), query_rows = tile_down_rows(tiles.query, kChunkBytes);
        const int grad_out_tiles = tile_along_rows(tiles.grad_out);
        const int grad_out_rows = tile_down_rows(tiles.grad_out, kChunkBytes);
        Stages stages;
        uint32_t key_parity = 0;
        int stored = -1;  // stage whose gradients this thread's last copies may still read
        const auto release_stored = [&] {
            if (is_leader && stored >= 0) {
                tma_store_wait_read();
                barrier_arrive(&state.free[stored]);
                stored = -1;
            }
            __syncwarp();  // products follow
        };

        while (true) {
            barrier_wait(&state.full[stages.place], stages.parity);
            const int total = from_lane_0(state.work[stages.place].steps);
            if (total == Work::kNone) break;
            float grad_key[kHeadDim / 2], grad_value[kHeadDim / 2];
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; i++) grad_key[i] = grad_value[i] = 0.0f;
            if (total > 0) {
                barrier_wait(&state.key_full, key_parity);
                key_parity ^= 1;
            }
            for (int step = 0; step < total; step++) {
                if (step > 0) {
                    barrier_leave(&state.free[stages.place]);
                    stages.advance();
                }
                const int stage = stages.place;
                barrier_wait(&state.full[stage], stages.parity);
                // Reads queue behind those of the products: these are sent ahead of them.
                const PairStatistics* const statistics = state.statistics[stage];
                float2 offsets[8], deltas[8];
#pragma unroll
                for (int i = 0; i < 8; i++) offsets[i] = statistics[4 * i + lane % 4].offset;
                float weights[32], grads[32];
                wgmma_fence();
                issue_scores<T, kHeadDim>(weights, key_tile, kChunkBytes, query_tiles + stage * kStageDistance, kChunkBytes);
                issue_scores<T, kHeadDim>(grads, value_tile, kChunkBytes, grad_out_tiles + stage * kStageDistance, kChunkBytes);
                release_stored();
                wgmma_wait<1>(weights);
#pragma unroll
                for (int i = 0; i < 8; i++) exponentiate(weights, i, params.scale_log2, offsets[i]);
#pragma unroll
                for (int i = 0; i < 8; i++) deltas[i] = statistics[4 * i + lane % 4].delta;
                wgmma_wait<0>(grads);
                if (step == total - 1) barrier_leave(&state.key_free);
                uint32_t a_weights[4][4], a_grads[4][4];
#pragma unroll
                for (int i = 0; i < 8; i++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        grads[4 * i + j] = weights[4 * i + j] * (grads[4 * i + j] - (j % 2 ? deltas[i].y : deltas[i].x));
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
            }
            release_stored();
            end(params, tiles, state, team, stages.place, grad_key, grad_value);
            if (is_leader) {
                stored = stages.place;
            } else if (lane == 0) {
                barrier_arrive(&state.free[stages.place]);
            }
            stages.advance();
        }
        if (is_leader) tma_store_wait_read();
    }

    static __device__ __forceinline__ void end(const BackwardParams& params, Tiles& tiles, const State& state, int team,
                                               int stage, const float (&grad_key)[kHeadDim / 2],
                                               const float (&grad_value)[kHeadDim / 2]) {
        const Work& work = state.work[stage];
        const BlockCode block = from_lane_0(work.block);
        const int half = from_lane_0(work.half), batch = from_lane_0(work.batch);
        bool kept[2] = {true, true};
        if (params.key_padding != nullptr) {
            const GridParams& grid = params.key_grid;
            const BlockPlace tokens(grid, block);
            const int64_t count = grid.prefix + grid.height * grid.width + grid.suffix;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int slot = half * kHalfBlockTokens + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * i;
                if (tokens.exists(slot)) kept[i] = !params.key_padding[batch * count + tokens.token(slot)];
            }
        }
        unsigned char *const staged_key = tiles.query[stage], *const staged_value = tiles.grad_out[stage];
        warpgroup_sync(team);
        stage_half_block<T, kHeadDim>(staged_key, grad_key, params.scale, kept);
        stage_half_block<T, kHeadDim>(staged_value, grad_value, 1.0f, kept);
        fence_async_proxy();
        warpgroup_sync(team);
        if (threadIdx.x % 128 != 0) return;
        const GridParams& grid = params.key_grid;
        store_half_block<kChunks>(params.grad_key, grid, block, half, work.head, batch, staged_key, kChunkBytes);
        store_half_block<kChunks>(params.grad_value, grid, block, half, work.head, batch, staged_value, kChunkBytes);
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        if (threadIdx.x == 0) {
            for (State& state : storage.states) {
                barrier_init(&state.key_full, 1);
                barrier_init(&state.key_free, kTeamWarps);
                for (int stage = 0; stage < kStages; stage++) {
                    barrier_init(&state.full[stage], 1);
                    barrier_init(&state.free[stage], kTeamWarps);
                }
            }
            barrier_init_fence();
        }
        __syncthreads();
        await_kernel_before();  // which writes the statistics
        const int warpgroup = warp_uniform(threadIdx.x / 128);
        if (warpgroup == kTeams) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
            const int team = warp_uniform(threadIdx.x / 32 % 4);
            if (team < kTeams) produce(params, storage.tiles[team], storage.states[team], team);
        } else {
            if constexpr (kTeams == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
            if constexpr (kTeams == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
            consume(params, storage.tiles[warpgroup], storage.states[warpgroup], warpgroup);
        }
    }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(PersistentKeyBackward<T, kHeadDim>::kThreads, 1)
    backward_key_persistent(const __grid_constant__ BackwardParams params) {
    using Kernel = PersistentKeyBackward<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
