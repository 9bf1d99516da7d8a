// All gradients in one pass: five products per pair of blocks instead of the pair of kernels' seven.
//
// A thread block stays on its multiprocessor and computes blocks of 128 keys one after the other: two warpgroups of 64 keys
// walk over the queries that attend to them, in steps of 128 queries (64 for wide heads). dK and dV stay in registers; dQ,
// which every block of keys adds to, goes to a float32 workspace by vector reductions, in an order of additions that differs
// from run to run.
//
//   first half of a step     dV of this step and dQ of the last one on the tensor cores | dS, from dP
//   second half              S and dP of the next step and dK of this one               | exponentials, from S
//
// Products run under arithmetic of the same warpgroup in both halves, and the warpgroups take turns at the exponentials,
// which keeps them out of step. dQ needs the dS of both, hence comes a step later, when both are surely there.
#pragma once

#include "../common/half_block.cuh"
#include "../common/query_list.cuh"
#include "../common/query_sums.cuh"
#include "../common/softmax.cuh"
#include "../common/statistics.cuh"
#include "../common/tma.cuh"
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
struct FusedBackward {
    static_assert(kHeadDim <= 128, "two 64-wide chunks per tile");
    static constexpr int kConsumerWarps = 8;
    static constexpr int kThreads = 128 + 32 * kConsumerWarps;
    static constexpr bool kIsWide = kHeadDim > 64;
    static constexpr int kQueries = kIsWide ? 64 : 128;  // per step
    static constexpr int kHalves = kQueries / kHalfBlockTokens;
    static constexpr int kStages = 3;         // of queries, and of dS
    static constexpr int kGradOutStages = 2;
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kHalfBytes = kHalfBlockTokens * 128;  // of one chunk
    static constexpr int kKeyChunkBytes = kBlockTokens * 128, kQueryChunkBytes = kQueries * 128;
    static constexpr int kKeyBytes = kChunks * kKeyChunkBytes, kQueryBytes = kChunks * kQueryChunkBytes;
    static constexpr int kConsumersBarrier = 6;

    struct Storage {
        alignas(1024) unsigned char key[kKeyBytes];
        alignas(1024) unsigned char value[kKeyBytes];
        alignas(1024) unsigned char query[kStages][kQueryBytes];
        alignas(1024) unsigned char grad_out[kGradOutStages][kQueryBytes];
        alignas(1024) unsigned char grads[kStages][2][kQueryChunkBytes];  // dS, a chunk for each warpgroup's 64 keys
        alignas(16) PairStatistics statistics[kStages][kQueries / 2];
        int half_block[kStages];  // of queries, the step's first: its number over all batch entries and heads
        int steps;                // of the block of keys
        uint64_t key_full, key_free, query_full[kStages], query_free[kStages];
        uint64_t grad_out_full[kGradOutStages], grad_out_free[kGradOutStages], grads_full[kStages];
    };
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // Heads follow each other, so that their queries stay in the cache.
    struct Work {
        int key_block, head, batch;
        __device__ __forceinline__ Work(const BackwardParams& params, int index) {
            const int heads = params.query_heads / params.heads_per_key_head, any_head = index / params.key_grid.num_blocks;
            key_block = index - any_head * params.key_grid.num_blocks;
            batch = any_head / heads;
            head = any_head - batch * heads;
        }
    };
    static __device__ __forceinline__ int work_count(const BackwardParams& params) {
        return params.key_grid.num_blocks * (params.query_heads / params.heads_per_key_head) * params.batch;
    }

    // A place in a ring, and the parity of its barriers' phase.
    template <int kPlaces>
    struct Ring {
        int slot = 0;
        uint32_t parity = 0;
        __device__ __forceinline__ void advance() {
            if (++slot == kPlaces) {
                slot = 0;
                parity ^= 1;
            }
        }
        __device__ __forceinline__ Ring next() const {
            Ring ring = *this;
            ring.advance();
            return ring;
        }
        __device__ __forceinline__ Ring before() const {
            return slot == 0 ? Ring{kPlaces - 1, parity ^ 1} : Ring{slot - 1, parity};
        }
    };

    // Half blocks from `half` on, into a tile of kRows rows; called by a whole warp.
    template <int kRows>
    static __device__ __forceinline__ void load(unsigned char* tile, const TensorMaps& maps, const GridParams& grid,
                                                BlockCode block, int half, int head, int batch, uint64_t* full) {
        with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int i = 0; i < kRows / kHalfBlockTokens; i++) {
                TileCoordinates at = half_block_at(grid, block, half + i, head, batch);
#pragma unroll
                for (int chunk = 0; chunk < kChunks; chunk++) {
                    at.column = 64 * chunk;
                    tma_load(tile + chunk * kRows * 128 + i * kHalfBytes, map, at, full);
                }
            }
        });
    }

    // The producer warp runs ahead as far as the rings reach, across the borders between blocks of keys.
    static __device__ __forceinline__ void produce(const BackwardParams& params, Storage& storage) {
        Ring<kStages> queries;
        Ring<kGradOutStages> grad_outs;
        uint32_t key_parity = 1;
        for (int index = blockIdx.x; index < work_count(params); index += gridDim.x) {
            const Work work(params, index);
            const BlockCode key_block = warp_uniform(code_of_block(params.key_grid, work.key_block));
            QueryList list;
            list.open(params, work.key_block, work.head, work.batch);
            const int steps = list.total(params) * (kBlockTokens / kQueries);
            const auto load_keys = [&] {
                barrier_wait(&storage.key_free, key_parity);
                key_parity ^= 1;
                if (threadIdx.x % 32 == 0) storage.steps = steps;
                __syncwarp();
                uint64_t* full = &storage.key_full;
                barrier_arrive_expect(full, steps == 0 ? 0 : 2 * kKeyBytes);
                if (steps == 0) return;
                load<kBlockTokens>(storage.key, params.key, params.key_grid, key_block, 0, work.head, work.batch, full);
                load<kBlockTokens>(storage.value, params.value, params.key_grid, key_block, 0, work.head, work.batch, full);
            };
            if (steps == 0) load_keys();
            BlockCode block = 0;
            for (int step = 0; step < steps; step++) {
                const int half = kHalves == 2 ? 0 : step % 2;
                if (half == 0) block = list.next(params);
                const int any_head = work.batch * params.query_heads + list.head;
                const int half_block = 2 * block_of_code(params.query_grid, block) + half;

                barrier_wait(&storage.query_free[queries.slot], queries.parity ^ 1);
                if (threadIdx.x % 32 == 0) {
                    storage.half_block[queries.slot] = any_head * 2 * params.query_grid.num_blocks + half_block;
                }
                __syncwarp();
                uint64_t* full = &storage.query_full[queries.slot];
                barrier_arrive_expect(full, kQueryBytes + sizeof(storage.statistics[0]));
                load<kQueries>(storage.query[queries.slot], params.query, params.query_grid, block, half, list.head,
                               work.batch, full);
                load_statistics<kHalves>(storage.statistics[queries.slot], params, half_block, list.head, work.batch, full);
                queries.advance();
                // The first queries are asked for before the keys, whose place is free only now.
                if (step == 0) load_keys();

                full = &storage.grad_out_full[grad_outs.slot];
                barrier_wait(&storage.grad_out_free[grad_outs.slot], grad_outs.parity ^ 1);
                barrier_arrive_expect(full, kQueryBytes);
                load<kQueries>(storage.grad_out[grad_outs.slot], params.grad_out, params.query_grid, block, half, list.head,
                               work.batch, full);
                grad_outs.advance();
            }
        }
    }

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

    // dV += P^T dO
    static __device__ __forceinline__ void issue_grad_value(float (&gradient)[kHeadDim / 2],
                                                            const uint32_t (&weights)[kQueries / 16][4], int grad_outs) {
#pragma unroll
        for (int step = 0; step < kQueries / 16; step++) {
            wgmma_output<T, kHeadDim>(gradient, weights[step], tile_descriptor(grad_outs + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    // dK += dS^T Q, from the dS that the warpgroup has written: from registers, they would be held too long.
    static __device__ __forceinline__ void issue_grad_key(float (&gradient)[kHeadDim / 2], int grads, int queries) {
#pragma unroll
        for (int step = 0; step < kQueries / 16; step++) {
            wgmma_shared_output<T, kHeadDim, true, true>(gradient, tile_descriptor(grads + step * kDepthStepDownRows),
                                                         tile_descriptor(queries + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    // dQ = dS K of a step. The warpgroups share it by queries, or, if there are 64, by chunks of columns.
    static constexpr int kGradQueryColumns = kIsWide ? 64 : kHeadDim;
    static __device__ __forceinline__ void issue_grad_query(float (&gradient)[kGradQueryColumns / 2], Storage& storage,
                                                            int slot, int warpgroup) {
        const int grads = tile_along_rows(storage.grads[slot][0] + (kIsWide ? 0 : warpgroup * kHalfBytes));
        const int keys = tile_down_rows(storage.key + (kIsWide ? warpgroup * kKeyChunkBytes : 0), kKeyChunkBytes);
#pragma unroll
        for (int step = 0; step < kBlockTokens / 16; step++) {
            const int along = step / 4 * (kQueryChunkBytes >> 4) + step % 4 * kDepthStepAlongRows;
            const uint64_t a = tile_descriptor(grads + along), b = tile_descriptor(keys + step * kDepthStepDownRows);
            if (step == 0) {
                wgmma_shared_output<T, kGradQueryColumns, false>(gradient, a, b);
            } else {
                wgmma_shared_output<T, kGradQueryColumns, true>(gradient, a, b);
            }
        }
        wgmma_commit();
    }

    static __device__ __forceinline__ void add_grad_query(const BackwardParams& params, int half_block, int warpgroup,
                                                          const float (&gradient)[kGradQueryColumns / 2]) {
        if constexpr (kIsWide) {
            const int groups = warpgroup == 0 ? 8 : kHeadDim / 8 - 8;
            add_to_query_sums<kHeadDim>(params.grad_query_sums, half_block, 8 * warpgroup, groups, gradient);
        } else {
            add_to_query_sums<kHeadDim>(params.grad_query_sums, half_block + warpgroup, 0, kHeadDim / 8, gradient);
        }
    }

    // exp2(scale_log2 s - L), packed; keys that do not exist get 0.
    static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kQueries / 16][4],
                                                        const float (&scores)[kQueries / 2],
                                                        const PairStatistics* statistics, float scale_log2,
                                                        const uint32_t (&exists)[2]) {
#pragma unroll
        for (int i = 0; i < kQueries / 8; i++) {
            const float2 offset = statistics[4 * i + threadIdx.x % 4].offset;
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

    // Bits of the packed weights of this thread's two keys that may stay.
    static __device__ __forceinline__ void existing_keys(uint32_t (&exists)[2], const BackwardParams& params,
                                                         BlockCode key_block, int batch) {
        const GridParams& grid = params.key_grid;
        const BlockPlace place(grid, key_block);
        const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int slot = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
            bool present = place.exists(slot);
            if (present && params.key_padding != nullptr) present = !params.key_padding[batch * tokens + place.token(slot)];
            exists[i] = present ? 0xffffffff : 0;
        }
    }

    // Waits for both warpgroups.
    static __device__ __forceinline__ void consumers_sync() {
        asm volatile("bar.sync %0, %1;" ::"n"(kConsumersBarrier), "n"(32 * kConsumerWarps) : "memory");
    }

    static __device__ __forceinline__ void consume(const BackwardParams& params, Storage& storage) {
        const int warpgroup = warp_uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
        const bool leader = threadIdx.x % 128 == 0;
        const int own_keys = tile_along_rows(storage.key + warpgroup * kHalfBytes);
        const int own_values = tile_along_rows(storage.value + warpgroup * kHalfBytes);
        Ring<kStages> queries;
        Ring<kGradOutStages> grad_outs;
        uint32_t key_parity = 0;
        if (warpgroup == 1) give_turn(0);

        for (int index = blockIdx.x; index < work_count(params); index += gridDim.x) {
            const Work work(params, index);
            const BlockCode key_block = warp_uniform(code_of_block(params.key_grid, work.key_block));
            uint32_t exists[2];
            existing_keys(exists, params, key_block, work.batch);
            float grad_key[kHeadDim / 2], grad_value[kHeadDim / 2];
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; i++) grad_key[i] = grad_value[i] = 0.0f;
            barrier_wait(&storage.key_full, key_parity);
            key_parity ^= 1;
            const int steps = warp_uniform(storage.steps);

            uint32_t weights[kQueries / 16][4];
            float grads[kQueries / 2];
            if (steps > 0) {
                float scores[kQueries / 2];
                barrier_wait(&storage.query_full[queries.slot], queries.parity);
                barrier_wait(&storage.grad_out_full[grad_outs.slot], grad_outs.parity);
                wgmma_fence();
                issue_scores(scores, own_keys, tile_along_rows(storage.query[queries.slot]));
                issue_scores(grads, own_values, tile_along_rows(storage.grad_out[grad_outs.slot]));
                wgmma_wait<1>(scores);
                await_turn(warpgroup);
                exponentiate(weights, scores, storage.statistics[queries.slot], params.scale_log2, exists);
                give_turn(warpgroup ^ 1);
                wgmma_wait<0>(grads);
            }
            int half_block_before = 0;
            for (int step = 0; step < steps; step++) {
                const Ring<kStages> next = queries.next(), before = queries.before();
                // The first step computes a dQ that nobody adds.
                float grad_query[kGradQueryColumns / 2];
                if (step > 0) barrier_wait(&storage.grads_full[before.slot], before.parity);
                pin_registers(grad_value);
                pin_operands(weights);
                wgmma_fence();
                issue_grad_value(grad_value, weights, tile_down_rows(storage.grad_out[grad_outs.slot], kQueryChunkBytes));
                issue_grad_query(grad_query, storage, before.slot, warpgroup);
                uint32_t packed_grads[kQueries / 16][4];
#pragma unroll
                for (int i = 0; i < kQueries / 8; i++) {
                    const float2 delta = storage.statistics[queries.slot][4 * i + lane % 4].delta;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        packed_grads[i / 2][i % 2 * 2 + j] =
                            score_gradient<T>(weights[i / 2][i % 2 * 2 + j], grads[4 * i + 2 * j] - delta.x,
                                              grads[4 * i + 2 * j + 1] - delta.y);
                    }
                }
                // The last readers of this place were the dQ of three steps ago, issued in the step before the last.
                if (step > 1) barrier_wait(&storage.query_free[next.slot], next.parity ^ 1);
                stage_grads(storage.grads[queries.slot][warpgroup], packed_grads);
                fence_async_proxy();
                wgmma_wait<0>(grad_value);
                pin_registers(grad_query);
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(&storage.grads_full[queries.slot]);
                    barrier_arrive(&storage.grad_out_free[grad_outs.slot]);
                }
                const int half_block = storage.half_block[queries.slot];
                if (step > 0) add_grad_query(params, half_block_before, warpgroup, grad_query);
                half_block_before = half_block;
                // Before dS is written where an earlier block's gradients lie, their copy must have read them.
                if (leader && step == 0) tma_store_wait_read();
                warpgroup_sync(warpgroup);

                // The last step computes scores again that nobody reads.
                const bool last = step + 1 == steps;
                const Ring<kStages> ahead = last ? queries : next;
                const Ring<kGradOutStages> grad_ahead = last ? grad_outs : grad_outs.next();
                barrier_wait(&storage.query_full[ahead.slot], ahead.parity);
                if (!last) barrier_wait(&storage.grad_out_full[grad_ahead.slot], grad_ahead.parity);
                float scores[kQueries / 2];
                pin_registers(grad_key);
                wgmma_fence();
                issue_scores(scores, own_keys, tile_along_rows(storage.query[ahead.slot]));
                issue_scores(grads, own_values, tile_along_rows(storage.grad_out[grad_ahead.slot]));
                issue_grad_key(grad_key, tile_down_rows(storage.grads[queries.slot][warpgroup], kQueryChunkBytes),
                               tile_down_rows(storage.query[queries.slot], kQueryChunkBytes));
                wgmma_wait<2>(scores);
                await_turn(warpgroup);
                exponentiate(weights, scores, storage.statistics[ahead.slot], params.scale_log2, exists);
                // Long done; but the compiler, which would wait for dK before the exponentials, does not look past it.
                pin_operands(weights);
                barrier_wait(&storage.query_full[ahead.slot], ahead.parity);
                give_turn(warpgroup ^ 1);
                wgmma_wait<0>(grads);
                pin_registers(grad_key);
                __syncwarp();
                if (lane == 0) barrier_arrive(&storage.query_free[queries.slot]);
                queries.advance();
                grad_outs.advance();
            }
            const Ring<kStages> before = queries.before();
            if (steps > 0) {
                barrier_wait(&storage.grads_full[before.slot], before.parity);
                float grad_query[kGradQueryColumns / 2];
                wgmma_fence();
                issue_grad_query(grad_query, storage, before.slot, warpgroup);
                wgmma_wait<0>(grad_query);
                add_grad_query(params, half_block_before, warpgroup, grad_query);
            }
            end(params, storage, work, key_block, before.slot, warpgroup, leader, grad_key, grad_value);
        }
        if (leader) tma_store_wait_read();
    }

    // The gradients of keys and values leave through the place of the last dS, or, where that is too small, of K and V.
    static __device__ __forceinline__ void end(const BackwardParams& params, Storage& storage, const Work& work,
                                               BlockCode key_block, int slot, int warpgroup, bool leader,
                                               const float (&grad_key)[kHeadDim / 2],
                                               const float (&grad_value)[kHeadDim / 2]) {
        unsigned char* const key =
            kIsWide ? storage.key + warpgroup * kChunks * kHalfBytes : storage.grads[slot][warpgroup];
        unsigned char* const value =
            kIsWide ? storage.value + warpgroup * kChunks * kHalfBytes : storage.grads[slot][warpgroup] + kHalfBytes;
        if (leader) tma_store_wait_read();
        consumers_sync();
        if (!kIsWide && leader) barrier_arrive(&storage.key_free);
        const bool kept[2] = {true, true};
        stage_half_block<T, kHeadDim>(key, grad_key, params.scale, kept);
        stage_half_block<T, kHeadDim>(value, grad_value, 1.0f, kept);
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (!leader) return;
        store(params.grad_key, params.key_grid, key, key_block, warpgroup, work);
        store(params.grad_value, params.key_grid, value, key_block, warpgroup, work);
        tma_store_commit();
        if (kIsWide) {
            tma_store_wait_read();
            barrier_arrive(&storage.key_free);
        }
    }

    static __device__ __forceinline__ void store(const TensorMaps& maps, const GridParams& grid, const unsigned char* tile,
                                                 BlockCode block, int half, const Work& work) {
        TileCoordinates at = half_block_at(grid, block, half, work.head, work.batch);
        with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; chunk++) {
                at.column = 64 * chunk;
                tma_store(map, tile + chunk * kHalfBytes, at);
            }
        });
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        if (threadIdx.x == 0) {
            barrier_init(&storage.key_full, 1);
            barrier_init(&storage.key_free, 2);
            for (int stage = 0; stage < kStages; stage++) {
                barrier_init(&storage.query_full[stage], 1);
                barrier_init(&storage.query_free[stage], kConsumerWarps);
                barrier_init(&storage.grads_full[stage], kConsumerWarps);
            }
            for (int stage = 0; stage < kGradOutStages; stage++) {
                barrier_init(&storage.grad_out_full[stage], 1);
                barrier_init(&storage.grad_out_free[stage], kConsumerWarps);
            }
            barrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x >= 32 * kConsumerWarps) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
            if (threadIdx.x < 32 * (kConsumerWarps + 1)) produce(params, storage);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
            consume(params, storage);
        }
    }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(384, 1) backward_fused(const __grid_constant__ BackwardParams params) {
    using Kernel = FusedBackward<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
