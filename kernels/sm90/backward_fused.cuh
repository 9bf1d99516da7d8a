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
// which keeps them out of step. dQ needs the dS of both, hence comes a step later, when both are surely there. Steps follow
// each other across the borders between blocks of keys, so that little is lost where few queries attend to a block.
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
    static constexpr int kQueryStages = 3;
    static constexpr int kStages = 2;  // of everything else
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kHalfBytes = kHalfBlockTokens * 128;  // of one chunk
    static constexpr int kKeyChunkBytes = kBlockTokens * 128, kQueryChunkBytes = kQueries * 128;
    static constexpr int kKeyBytes = kChunks * kKeyChunkBytes, kQueryBytes = kChunks * kQueryChunkBytes;

    struct Storage {
        alignas(1024) unsigned char key[kStages][kKeyBytes];
        alignas(1024) unsigned char value[kKeyBytes];
        alignas(1024) unsigned char query[kQueryStages][kQueryBytes];
        alignas(1024) unsigned char grad_out[kStages][kQueryBytes];
        alignas(1024) unsigned char grads[kStages][2][kQueryChunkBytes];  // dS, a chunk for each warpgroup's 64 keys
        alignas(16) PairStatistics statistics[kQueryStages][kQueries / 2];
        int half_block[kQueryStages];  // of queries, the step's first: its number over all batch entries and heads
        int work[kStages], steps[kStages];  // of the block of keys
        uint64_t key_full[kStages], key_free[kStages], value_full, value_free;
        uint64_t query_full[kQueryStages], query_free[kQueryStages];
        uint64_t grad_out_full[kStages], grads_full[kStages];
        uint64_t grad_out_free[kStages];  // and the dS of the step before
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
    static constexpr int kNoWork = -1;
    static __host__ __device__ __forceinline__ int work_count(const BackwardParams& params) {
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
                                                BlockCode block, int half, int head, int batch, uint64_t* full,
                                                int shift = 0) {
        with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int i = 0; i < kRows / kHalfBlockTokens; i++) {
                TileCoordinates at = half_block_at(grid, block, half + i, head, batch);
                at.x += shift;
#pragma unroll
                for (int chunk = 0; chunk < kChunks; chunk++) {
                    at.column = 64 * chunk;
                    tma_load(tile + chunk * kRows * 128 + i * kHalfBytes, map, at, full);
                }
            }
        });
    }

    // The producer warp runs ahead as far as the rings reach. A block of keys that nobody attends to takes one step of
    // queries that do not exist.
    static __device__ __forceinline__ void produce(const BackwardParams& params, Storage& storage) {
        const int lane = threadIdx.x % 32;
        Ring<kQueryStages> queries;
        Ring<kStages> grad_outs, keys;
        uint32_t value_parity = 1;
        for (int index = blockIdx.x; index < work_count(params); index = take_work(params)) {
            const Work work(params, index);
            const BlockCode key_block = warp_uniform(code_of_block(params.key_grid, work.key_block));
            QueryList list;
            list.open(params, work.key_block, work.head, work.batch);
            const int attending = list.total(params) * (kBlockTokens / kQueries), steps = max(attending, 1);
            const int nowhere = attending == 0 ? -kBlockTokens : 0;
            BlockCode block = code_of_block(params.query_grid, 0);
            for (int step = 0; step < steps; step++) {
                const int half = kHalves == 2 ? 0 : step % 2;
                if (half == 0 && attending > 0) block = list.next(params);
                const int half_block = 2 * block_of_code(params.query_grid, block) + half;
                const int any_head = work.batch * params.query_heads + list.head;

                uint64_t* full = &storage.query_full[queries.slot];
                PairStatistics* statistics = storage.statistics[queries.slot];
                barrier_wait(&storage.query_free[queries.slot], queries.parity ^ 1);
                if (lane == 0) {
                    storage.half_block[queries.slot] = any_head * 2 * params.query_grid.num_blocks + half_block;
                }
                if (attending == 0) {
                    for (int i = lane; i < kQueries / 2; i += 32) statistics[i] = {{INFINITY, INFINITY}, {0.0f, 0.0f}};
                }
                __syncwarp();
                barrier_arrive_expect(full, kQueryBytes + (attending == 0 ? 0 : sizeof(storage.statistics[0])));
                load<kQueries>(storage.query[queries.slot], params.query, params.query_grid, block, half, list.head,
                               work.batch, full, nowhere);
                if (attending > 0) load_statistics<kHalves>(statistics, params, half_block, list.head, work.batch, full);
                queries.advance();

                if (step == 0) {
                    full = &storage.key_full[keys.slot];
                    barrier_wait(&storage.key_free[keys.slot], keys.parity ^ 1);
                    if (lane == 0) {
                        storage.work[keys.slot] = index;
                        storage.steps[keys.slot] = steps;
                    }
                    __syncwarp();
                    barrier_arrive_expect(full, kKeyBytes);
                    load<kBlockTokens>(storage.key[keys.slot], params.key, params.key_grid, key_block, 0, work.head,
                                       work.batch, full);
                    keys.advance();
                    barrier_wait(&storage.value_free, value_parity);
                    value_parity ^= 1;
                    barrier_arrive_expect(&storage.value_full, kKeyBytes);
                    load<kBlockTokens>(storage.value, params.value, params.key_grid, key_block, 0, work.head, work.batch,
                                       &storage.value_full);
                }

                full = &storage.grad_out_full[grad_outs.slot];
                barrier_wait(&storage.grad_out_free[grad_outs.slot], grad_outs.parity ^ 1);
                barrier_arrive_expect(full, kQueryBytes);
                load<kQueries>(storage.grad_out[grad_outs.slot], params.grad_out, params.query_grid, block, half, list.head,
                               work.batch, full, nowhere);
                grad_outs.advance();
            }
        }
        barrier_wait(&storage.key_free[keys.slot], keys.parity ^ 1);
        if (lane == 0) {
            storage.work[keys.slot] = kNoWork;
            barrier_arrive(&storage.key_full[keys.slot]);
        }
    }

    // Blocks of keys are handed out as thread blocks get to them: how many queries attend to them differs.
    static __device__ __forceinline__ int take_work(const BackwardParams& params) {
        int taken = 0;
        if (threadIdx.x % 32 == 0) taken = atomicAdd(params.blocks_taken, 1);
        return warp_uniform(taken) + gridDim.x;
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
                                                            int slot, int key_slot, int warpgroup) {
        const int grads = tile_along_rows(storage.grads[slot][0] + (kIsWide ? 0 : warpgroup * kHalfBytes));
        const int keys = tile_down_rows(storage.key[key_slot] + (kIsWide ? warpgroup * kKeyChunkBytes : 0), kKeyChunkBytes);
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

    // Some of the offsets L are read before it is the warpgroup's turn: as many as there are registers for.
    static constexpr int kEarlyOffsets = kIsWide ? 2 : 8;
    static __device__ __forceinline__ void read_offsets(float2 (&offsets)[kEarlyOffsets], const PairStatistics* statistics) {
#pragma unroll
        for (int i = 0; i < kEarlyOffsets; i++) offsets[i] = statistics[4 * i + threadIdx.x % 4].offset;
    }

    // exp2(scale_log2 s - L), packed; keys that do not exist get 0.
    static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kQueries / 16][4],
                                                        const float (&scores)[kQueries / 2],
                                                        const float2 (&early_offsets)[kEarlyOffsets],
                                                        const PairStatistics* statistics, float scale_log2,
                                                        const uint32_t (&exists)[2]) {
#pragma unroll
        for (int i = 0; i < kQueries / 8; i++) {
            const float2 offset = i < kEarlyOffsets ? early_offsets[i] : statistics[4 * i + threadIdx.x % 4].offset;
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
    static __device__ __forceinline__ void existing_keys(uint32_t (&exists)[2], const BackwardParams& params, int index) {
        const GridParams& grid = params.key_grid;
        const Work work(params, index);
        const BlockPlace place(grid, code_of_block(grid, work.key_block));
        const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int slot = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
            bool present = place.exists(slot);
            if (present && params.key_padding != nullptr) present = !params.key_padding[work.batch * tokens + place.token(slot)];
            exists[i] = present ? 0xffffffff : 0;
        }
    }

    static __device__ __forceinline__ void consume(const BackwardParams& params, Storage& storage) {
        const int warpgroup = warp_uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
        const bool leader = threadIdx.x % 128 == 0;
        const int own_values = tile_along_rows(storage.value + warpgroup * kHalfBytes);
        const auto own_keys = [&](int slot) { return tile_along_rows(storage.key[slot] + warpgroup * kHalfBytes); };
        Ring<kQueryStages> queries;
        Ring<kStages> steps, keys;  // of gradients of outputs, and of dS; of blocks of keys
        uint32_t value_parity = 0;
        int index = blockIdx.x;
        if (warpgroup == 1) give_turn(0);

        uint32_t exists[2];
        existing_keys(exists, params, index);
        float grad_key[kHeadDim / 2], grad_value[kHeadDim / 2];
        clear(grad_key, grad_value);
        uint32_t weights[kQueries / 16][4];
        float grads[kQueries / 2];
        barrier_wait(&storage.key_full[0], 0);
        barrier_wait(&storage.value_full, 0);
        int left = warp_uniform(storage.steps[0]);  // of the block of keys, with this one
        {
            float scores[kQueries / 2];
            barrier_wait(&storage.query_full[0], 0);
            barrier_wait(&storage.grad_out_full[0], 0);
            wgmma_fence();
            issue_scores(scores, own_keys(0), tile_along_rows(storage.query[0]));
            issue_scores(grads, own_values, tile_along_rows(storage.grad_out[0]));
            float2 offsets[kEarlyOffsets];
            read_offsets(offsets, storage.statistics[0]);
            wgmma_wait<1>(scores);
            await_turn(warpgroup);
            exponentiate(weights, scores, offsets, storage.statistics[0], params.scale_log2, exists);
            give_turn(warpgroup ^ 1);
            wgmma_wait<0>(grads);
            __syncwarp();
            if (lane == 0 && left == 1) barrier_arrive(&storage.value_free);
        }
        bool is_first = true, follows_border = false;
        int half_block_before = 0, key_slot_before = 0;
        while (true) {
            const Ring<kStages> before = steps.before();
            // The first step of all computes a dQ that nobody adds.
            float grad_query[kGradQueryColumns / 2];
            if (!is_first) barrier_wait(&storage.grads_full[before.slot], before.parity);
            pin_registers(grad_value);
            pin_operands(weights);
            wgmma_fence();
            issue_grad_value(grad_value, weights, tile_down_rows(storage.grad_out[steps.slot], kQueryChunkBytes));
            issue_grad_query(grad_query, storage, before.slot, key_slot_before, warpgroup);
            uint32_t packed_grads[kQueries / 16][4];
#pragma unroll
            for (int i = 0; i < kQueries / 8; i++) {
                const float2 delta = storage.statistics[queries.slot][4 * i + lane % 4].delta;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    packed_grads[i / 2][i % 2 * 2 + j] = score_gradient<T>(
                        weights[i / 2][i % 2 * 2 + j], grads[4 * i + 2 * j] - delta.x, grads[4 * i + 2 * j + 1] - delta.y);
                }
            }
            // This place was read by the dQ of the step before the last, and by the copies of finished gradients.
            if (!is_first) barrier_wait(&storage.grad_out_free[before.slot], before.parity);
            if (follows_border) {
                if (leader) tma_store_wait_read();
                warpgroup_sync(warpgroup);
            }
            stage_grads(storage.grads[steps.slot][warpgroup], packed_grads);
            fence_async_proxy();
            wgmma_wait<0>(grad_value);
            pin_registers(grad_query);
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&storage.grads_full[steps.slot]);
                barrier_arrive(&storage.grad_out_free[steps.slot]);
                if (follows_border) barrier_arrive(&storage.key_free[key_slot_before]);
            }
            const int half_block = storage.half_block[queries.slot];
            if (!is_first) add_grad_query(params, half_block_before, warpgroup, grad_query);
            half_block_before = half_block;
            key_slot_before = keys.slot;
            is_first = false;
            warpgroup_sync(warpgroup);

            // The next step, which may be another block's. The last of all computes scores again that nobody reads.
            follows_border = left == 1;
            bool is_last = false;
            Ring<kStages> next_keys = keys;
            int next_index = index;
            if (follows_border) {
                next_keys.advance();
                barrier_wait(&storage.key_full[next_keys.slot], next_keys.parity);
                next_index = warp_uniform(storage.work[next_keys.slot]);
                is_last = next_index == kNoWork;
                if (is_last) {
                    next_keys = keys;
                } else {
                    value_parity ^= 1;
                    barrier_wait(&storage.value_full, value_parity);
                    left = warp_uniform(storage.steps[next_keys.slot]);
                    existing_keys(exists, params, next_index);
                }
            } else {
                left--;
            }
            const Ring<kQueryStages> next_queries = is_last ? queries : queries.next();
            const Ring<kStages> next_step = is_last ? steps : steps.next();
            barrier_wait(&storage.query_full[next_queries.slot], next_queries.parity);
            barrier_wait(&storage.grad_out_full[next_step.slot], next_step.parity);
            float scores[kQueries / 2];
            pin_registers(grad_key);
            wgmma_fence();
            issue_scores(scores, own_keys(next_keys.slot), tile_along_rows(storage.query[next_queries.slot]));
            issue_scores(grads, own_values, tile_along_rows(storage.grad_out[next_step.slot]));
            issue_grad_key(grad_key, tile_down_rows(storage.grads[steps.slot][warpgroup], kQueryChunkBytes),
                           tile_down_rows(storage.query[queries.slot], kQueryChunkBytes));
            float2 offsets[kEarlyOffsets];
            read_offsets(offsets, storage.statistics[next_queries.slot]);
            wgmma_wait<2>(scores);
            await_turn(warpgroup);
            exponentiate(weights, scores, offsets, storage.statistics[next_queries.slot], params.scale_log2, exists);
            // Long done; but the compiler, which would wait for dK before the exponentials, does not look past it.
            pin_operands(weights);
            barrier_wait(&storage.query_full[next_queries.slot], next_queries.parity);
            give_turn(warpgroup ^ 1);
            wgmma_wait<0>(grads);
            pin_registers(grad_key);
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&storage.query_free[queries.slot]);
                if (left == 1 && !is_last) barrier_arrive(&storage.value_free);
            }
            if (follows_border) {
                // Both warpgroups are done with the dS of the step before, whose place the gradients leave through.
                barrier_wait(&storage.grad_out_free[steps.slot], steps.parity);
                store_gradients(params, storage.grads[steps.slot ^ 1][warpgroup], index, warpgroup, grad_key, grad_value);
                if (is_last) break;
                clear(grad_key, grad_value);
                index = next_index;
                keys = next_keys;
            }
            queries = next_queries;
            steps = next_step;
        }
        barrier_wait(&storage.grads_full[steps.slot], steps.parity);
        float grad_query[kGradQueryColumns / 2];
        wgmma_fence();
        issue_grad_query(grad_query, storage, steps.slot, keys.slot, warpgroup);
        wgmma_wait<0>(grad_query);
        add_grad_query(params, half_block_before, warpgroup, grad_query);
        if (leader) tma_store_wait_read();
    }

    static __device__ __forceinline__ void clear(float (&grad_key)[kHeadDim / 2], float (&grad_value)[kHeadDim / 2]) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) grad_key[i] = grad_value[i] = 0.0f;
    }

    // The last copies may still read `tile` when this returns.
    static __device__ __forceinline__ void store_gradients(const BackwardParams& params, unsigned char* tile, int index,
                                                           int warpgroup, const float (&grad_key)[kHeadDim / 2],
                                                           const float (&grad_value)[kHeadDim / 2]) {
        const Work work(params, index);
        const BlockCode block = warp_uniform(code_of_block(params.key_grid, work.key_block));
        const bool leader = threadIdx.x % 128 == 0;
        const TileCoordinates at = half_block_at(params.key_grid, block, warpgroup, work.head, work.batch);
        if constexpr (kIsWide) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; chunk++) {
                store_chunk(params.grad_key, tile, block, at, chunk, warpgroup, leader, grad_key, params.scale);
                store_chunk(params.grad_value, tile, block, at, chunk, warpgroup, leader, grad_value, 1.0f);
            }
        } else {
            stage_half_block<T, kHeadDim>(tile, grad_key, params.scale);
            stage_half_block<T, kHeadDim>(tile + kHalfBytes, grad_value, 1.0f);
            fence_async_proxy();
            warpgroup_sync(warpgroup);
            if (!leader) return;
            with_map(params.grad_key, block, [&](const CUtensorMap* map) { tma_store(map, tile, at); });
            with_map(params.grad_value, block, [&](const CUtensorMap* map) { tma_store(map, tile + kHalfBytes, at); });
            tma_store_commit();
        }
    }

    // Up to 64 columns, through a tile that has room for no more.
    static __device__ __forceinline__ void store_chunk(const TensorMaps& maps, unsigned char* tile, BlockCode block,
                                                       TileCoordinates at, int chunk, int warpgroup, bool leader,
                                                       const float (&gradient)[kHeadDim / 2], float factor) {
        if (leader) tma_store_wait_read();
        warpgroup_sync(warpgroup);
        constexpr int kLast = kHeadDim - 64;
        if (chunk == 0) {
            stage_half_block<T, 64>(tile, reinterpret_cast<const float(&)[32]>(gradient[0]), factor);
        } else {
            stage_half_block<T, kLast>(tile, reinterpret_cast<const float(&)[kLast / 2]>(gradient[32]), factor);
        }
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (!leader) return;
        at.column = 64 * chunk;
        with_map(maps, block, [&](const CUtensorMap* map) { tma_store(map, tile, at); });
        tma_store_commit();
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        if (threadIdx.x == 0) {
            barrier_init(&storage.value_full, 1);
            barrier_init(&storage.value_free, kConsumerWarps);
            for (int stage = 0; stage < kQueryStages; stage++) {
                barrier_init(&storage.query_full[stage], 1);
                barrier_init(&storage.query_free[stage], kConsumerWarps);
            }
            for (int stage = 0; stage < kStages; stage++) {
                barrier_init(&storage.key_full[stage], 1);
                barrier_init(&storage.key_free[stage], kConsumerWarps);
                barrier_init(&storage.grad_out_full[stage], 1);
                barrier_init(&storage.grad_out_free[stage], kConsumerWarps);
                barrier_init(&storage.grads_full[stage], kConsumerWarps);
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
