// All gradients in one pass: five products per pair of blocks instead of the pair of kernels' seven.
//
// A thread block stays on its multiprocessor and computes blocks of 128 keys one after the other: two warpgroups of 64 keys
// walk over the queries that attend to them, in steps of 128 queries (64 for wide heads). dK and dV stay in registers; dQ,
// which every block of keys adds to, goes to a float32 workspace by vector reductions, in an order of additions that differs
// from run to run.
//
//   first half of a step     dV of this step and dQ of the last one on the tensor cores | dS, from dP
//   second half              dK of this step, S and dP of the next                      | exponentials, from S
//
// Products run under arithmetic of the same warpgroup in both halves. dQ needs the dS of both warpgroups, hence comes a step
// later, when both are surely there, which leaves them free to be out of step. Steps follow each other across the borders
// between blocks of keys, so that little is lost where few queries attend to a block.
//
// A relative position is part of S and of the offsets of its exponents, and its gradients' sums are more columns of dQ: see
// common/fused_relative_position.cuh.
#pragma once

#include "../common/overlapping_launch.cuh"
#include "../common/query_list.cuh"
#include "../common/ring.cuh"
#include "../common/tma.cuh"
#include "backward_fused_step.cuh"
#include "backward_fused_store.cuh"
#include "backward_fused_work.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kRelativePosition>
struct FusedBackward {
    using Step = FusedStep<T, kHeadDim, kRelativePosition>;
    using Storage = typename Step::Storage;
    static constexpr int kThreads = Step::kThreads, kConsumerWarps = Step::kConsumerWarps;
    static constexpr bool kIsWide = Step::kIsWide, kFinishes = Step::kFinishes;
    static constexpr int kQueries = Step::kQueries, kHalves = Step::kHalves, kChunks = Step::kChunks;
    static constexpr int kQueryStages = Step::kQueryStages, kStages = Step::kStages;
    static constexpr int kHalfBytes = Step::kHalfBytes, kKeyBytes = Step::kKeyBytes, kQueryBytes = Step::kQueryBytes;
    static constexpr int kQueryChunkBytes = Step::kQueryChunkBytes;
    static constexpr int kBiasBytes = kRelativePosition ? sizeof(typename Step::Bias) : 0;

    // Half blocks from `half` on, into a tile of kRows rows whose second chunk starts at column kSplit; called by a whole
    // warp.
    template <int kRows, int kSplit = 64>
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
                    at.column = kSplit * chunk;
                    tma_load(tile + chunk * kRows * 128 + i * kHalfBytes, map, at, full);
                }
            }
        });
    }

    // The producer warp runs ahead as far as the rings reach. A block of keys that nobody attends to takes one step, of
    // queries that do not exist.
    static __device__ __forceinline__ void produce(const BackwardParams& params, Storage& storage) {
        const int lane = threadIdx.x % 32;
        Ring<kQueryStages> queries;
        Ring<kStages> grad_outs, keys;
        uint32_t value_parity = 1;
        for (int index = blockIdx.x; index < FusedWork::count(params); index = FusedWork::take(params)) {
            const FusedWork work(params, index);
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

                uint64_t* full = &storage.query_full[queries.place];
                barrier_wait(&storage.query_free[queries.place], queries.parity ^ 1);
                if (lane == 0) {
                    storage.half_block[queries.place] = any_head * 2 * params.query_grid.num_blocks + half_block;
                }
                __syncwarp();
                barrier_arrive_expect(full, kQueryBytes + sizeof(storage.statistics[0]));
                load<kQueries>(storage.query[queries.place], params.query, params.query_grid, block, half, list.head,
                               work.batch, full, nowhere);
                load_statistics<kHalves>(storage.statistics[queries.place], params, half_block, list.head, work.batch, full);
                queries.advance();

                if (step == 0) {
                    full = &storage.key_full[keys.place];
                    barrier_wait(&storage.key_free[keys.place], keys.parity ^ 1);
                    if (lane == 0) {
                        storage.work[keys.place] = index;
                        storage.steps[keys.place] = attending;
                        if constexpr (kRelativePosition) storage.key_block[keys.place] = key_block;
                    }
                    __syncwarp();
                    barrier_arrive_expect(full, kKeyBytes);
                    load<kBlockTokens, Step::kKeySplit>(storage.key[keys.place], params.key, params.key_grid, key_block, 0,
                                                        work.head, work.batch, full);
                    keys.advance();
                    barrier_wait(&storage.value_free, value_parity);
                    value_parity ^= 1;
                    barrier_arrive_expect(&storage.value_full, kKeyBytes);
                    load<kBlockTokens>(storage.value, params.value, params.key_grid, key_block, 0, work.head, work.batch,
                                       &storage.value_full);
                }

                full = &storage.grad_out_full[grad_outs.place];
                barrier_wait(&storage.grad_out_free[grad_outs.place], grad_outs.parity ^ 1);
                barrier_arrive_expect(full, kQueryBytes + kBiasBytes);
                load<kQueries>(storage.grad_out[grad_outs.place], params.grad_out, params.query_grid, block, half, list.head,
                               work.batch, full, nowhere);
                if constexpr (kRelativePosition) {
                    const int any_half_block = any_head * 2 * params.query_grid.num_blocks + half_block;
                    storage.bias[grad_outs.place].load(params, block, half, any_half_block, list.head, work.batch, nowhere,
                                                       key_block, full);
                }
                grad_outs.advance();
            }
        }
        barrier_wait(&storage.key_free[keys.place], keys.parity ^ 1);
        if (lane == 0) {
            storage.work[keys.place] = FusedWork::kNone;
            barrier_arrive(&storage.key_full[keys.place]);
            if constexpr (kFinishes) {
                for (int i = 0; i < kConsumerWarps; i++) barrier_arrive(&storage.added[keys.place]);
            }
        }
    }

    // Called by one warp: counts a head's blocks of keys whose dQ has been added. What it makes known includes what the
    // others had added before they arrived.
    static __device__ __forceinline__ void announce(const BackwardParams& params, Storage& storage) {
        Ring<kStages> keys;
        while (true) {
            barrier_wait(&storage.added[keys.place], keys.parity);
            const int index = from_lane_0(storage.work[keys.place]);
            if (index == FusedWork::kNone) return;
            if (threadIdx.x % 32 == 0) {
                barrier_arrive(&storage.key_free[keys.place]);
                int* const count = params.key_blocks_added + index / params.key_grid.num_blocks;
                asm volatile("fence.acq_rel.gpu;\n red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
            }
            __syncwarp();
            keys.advance();
        }
    }

    // Called by a warp that has added all of its part of a block of keys' dQ.
    static __device__ __forceinline__ void tell_added(Storage& storage, int key_slot) {
        if constexpr (kFinishes) barrier_leave(&storage.added[key_slot]);
    }

    // Bits of the packed weights of this thread's two keys that may stay.
    static __device__ __forceinline__ void existing_keys(uint32_t (&exists)[2], const BackwardParams& params, int index) {
        const GridParams& grid = params.key_grid;
        const FusedWork work(params, index);
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

    static __device__ __forceinline__ BlockCode key_block_of(const Storage& storage, int slot) {
        if constexpr (kRelativePosition) return from_lane_0(storage.key_block[slot]);
        return 0;
    }

    // At least one; where nobody attends to the keys, they do not exist in it.
    static __device__ __forceinline__ int steps_of(const Storage& storage, int slot, uint32_t (&exists)[2]) {
        const int attending = from_lane_0(storage.steps[slot]);
        if (attending == 0) exists[0] = exists[1] = 0;
        return max(attending, 1);
    }

    template <int kWarpgroup>
    static __device__ __forceinline__ void consume(const BackwardParams& params, Storage& storage) {
        constexpr int warpgroup = kWarpgroup, kGradQueryColumns = Step::grad_query_columns(kWarpgroup);
        const int lane = threadIdx.x % 32;
        const bool leader = threadIdx.x % 128 == 0;
        const int own_values = tile_along_rows(storage.value + warpgroup * kHalfBytes);
        const auto own_keys = [&](int slot) { return tile_along_rows(storage.key[slot] + warpgroup * kHalfBytes); };
        Ring<kQueryStages> queries;
        Ring<kStages> steps, keys;  // of gradients of outputs, and of dS; of blocks of keys
        uint32_t value_parity = 0;
        int index = blockIdx.x;

        uint32_t exists[2];
        existing_keys(exists, params, index);
        float grad_key[kHeadDim / 2], grad_value[kHeadDim / 2];
        clear(grad_key, grad_value);
        uint32_t weights[kQueries / 16][4];
        float grads[kQueries / 2];
        barrier_wait(&storage.key_full[0], 0);
        barrier_wait(&storage.value_full, 0);
        int left = steps_of(storage, 0, exists);  // of the block of keys, with this one
        {
            float scores[kQueries / 2];
            barrier_wait(&storage.query_full[0], 0);
            barrier_wait(&storage.grad_out_full[0], 0);
            typename Step::Factors factors;
            Step::make_factors(factors, params);
            wgmma_fence();
            Step::issue_logits(scores, own_keys(0), storage, 0, 0, factors);
            Step::issue_scores(grads, own_values, tile_along_rows(storage.grad_out[0]));
            typename Step::EarlyOffsets offsets;
            Step::read_offsets(offsets, storage, 0, 0);
            wgmma_wait<1>(scores);
            Step::exponentiate(weights, scores, offsets, storage, 0, 0, params.scale_log2, exists);
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
            if (!is_first) barrier_wait(&storage.grads_full[before.place], before.parity);
            pin_registers(grad_value);
            pin_operands(weights);
            wgmma_fence();
            Step::issue_gradient(grad_value, weights, tile_down_rows(storage.grad_out[steps.place], kQueryChunkBytes));
            Step::template issue_grad_query<kWarpgroup>(grad_query, storage, before.place, key_slot_before);
            uint32_t packed_grads[kQueries / 16][4];
#pragma unroll
            for (int i = 0; i < kQueries / 8; i++) {
                const float2 delta = storage.statistics[queries.place][4 * i + lane % 4].delta;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    packed_grads[i / 2][i % 2 * 2 + j] = score_gradient<T>(
                        weights[i / 2][i % 2 * 2 + j], grads[4 * i + 2 * j] - delta.x, grads[4 * i + 2 * j + 1] - delta.y);
                }
            }
            // Wide heads keep the tensor cores busy with it while dQ is added; others are faster with it later.
            if constexpr (kIsWide) {
                pin_registers(grad_key);
                pin_operands(packed_grads);
                wgmma_fence();
                Step::issue_gradient(grad_key, packed_grads, tile_down_rows(storage.query[queries.place], kQueryChunkBytes));
            }
            // This place was read by the dQ of the step before the last, and by the copies of finished gradients.
            if (!is_first) barrier_wait(&storage.grad_out_free[before.place], before.parity);
            if (follows_border) {
                if (leader) tma_store_wait_read();
                warpgroup_sync(warpgroup);
            }
            Step::stage_grads(storage.grads[steps.place][warpgroup], packed_grads);
            fence_async_proxy();
            wgmma_wait<kIsWide ? 1 : 0>(grad_value);
            pin_registers(grad_query);
            const BlockCode key_block_before = key_block_of(storage, key_slot_before);
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&storage.grads_full[steps.place]);
                barrier_arrive(&storage.grad_out_free[steps.place]);
                if (follows_border) barrier_arrive(&storage.key_free[key_slot_before]);
            }
            const int half_block = from_lane_0(storage.half_block[queries.place]);
            if (!is_first) Step::template add_grad_query<kWarpgroup>(params, half_block_before, key_block_before, grad_query);
            if (follows_border) tell_added(storage, key_slot_before);
            half_block_before = half_block;
            key_slot_before = keys.place;
            is_first = false;
            if constexpr (!kIsWide) warpgroup_sync(warpgroup);

            // The next step, which may be another block's. The last of all computes scores again that nobody reads.
            follows_border = left == 1;
            bool is_last = false;
            Ring<kStages> next_keys = keys;
            int next_index = index;
            if (follows_border) {
                next_keys.advance();
                barrier_wait(&storage.key_full[next_keys.place], next_keys.parity);
                next_index = from_lane_0(storage.work[next_keys.place]);
                is_last = next_index == FusedWork::kNone;
                if (is_last) {
                    next_keys = keys;
                } else {
                    value_parity ^= 1;
                    barrier_wait(&storage.value_full, value_parity);
                    existing_keys(exists, params, next_index);
                    left = steps_of(storage, next_keys.place, exists);
                }
            } else {
                left--;
            }
            const Ring<kQueryStages> next_queries = is_last ? queries : queries.next();
            const Ring<kStages> next_step = is_last ? steps : steps.next();
            barrier_wait(&storage.query_full[next_queries.place], next_queries.parity);
            barrier_wait(&storage.grad_out_full[next_step.place], next_step.parity);
            float scores[kQueries / 2];
            if constexpr (!kIsWide) {
                pin_registers(grad_key);
                pin_operands(packed_grads);
            }
            typename Step::Factors factors;
            Step::make_factors(factors, params);
            wgmma_fence();
            if constexpr (!kIsWide) {
                Step::issue_gradient(grad_key, packed_grads, tile_down_rows(storage.query[queries.place], kQueryChunkBytes));
            }
            Step::issue_logits(scores, own_keys(next_keys.place), storage, next_queries.place, next_step.place, factors);
            wgmma_wait<1>(grad_key);
            wgmma_fence();
            Step::issue_scores(grads, own_values, tile_along_rows(storage.grad_out[next_step.place]));
            typename Step::EarlyOffsets offsets;
            Step::read_offsets(offsets, storage, next_queries.place, next_step.place);
            wgmma_wait<1>(scores);
            pin_registers(grad_key);
            Step::exponentiate(weights, scores, offsets, storage, next_queries.place, next_step.place, params.scale_log2,
                               exists);
            // Long done; but the compiler, which would wait for dK before the exponentials, does not look past it.
            pin_operands(weights);
            barrier_wait(&storage.query_full[next_queries.place], next_queries.parity);
            wgmma_wait<0>(grads);
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&storage.query_free[queries.place]);
                if (left == 1 && !is_last) barrier_arrive(&storage.value_free);
            }
            if (follows_border) {
                // Both warpgroups are done with the dS of the step before, whose place the gradients leave through.
                barrier_wait(&storage.grad_out_free[steps.place], steps.parity);
                KeyGradients<T, kHeadDim>::store(params, storage.grads[steps.place ^ 1][warpgroup], index, warpgroup, grad_key,
                                                 grad_value);
                if (is_last) break;
                clear(grad_key, grad_value);
                index = next_index;
                keys = next_keys;
            }
            queries = next_queries;
            steps = next_step;
        }
        barrier_wait(&storage.grads_full[steps.place], steps.parity);
        float grad_query[kGradQueryColumns / 2];
        wgmma_fence();
        Step::template issue_grad_query<kWarpgroup>(grad_query, storage, steps.place, keys.place);
        wgmma_wait<0>(grad_query);
        Step::template add_grad_query<kWarpgroup>(params, half_block_before, key_block_of(storage, keys.place), grad_query);
        tell_added(storage, keys.place);
        if (leader) tma_store_wait_read();
    }

    static __device__ __forceinline__ void clear(float (&grad_key)[kHeadDim / 2], float (&grad_value)[kHeadDim / 2]) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) grad_key[i] = grad_value[i] = 0.0f;
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        if constexpr (kRelativePosition) {
            storage.places.fill();
            fence_async_proxy();
        }
        if (threadIdx.x == 0) {
            barrier_init(&storage.value_full, 1);
            barrier_init(&storage.value_free, kConsumerWarps);
            for (int stage = 0; stage < kQueryStages; stage++) {
                barrier_init(&storage.query_full[stage], 1);
                barrier_init(&storage.query_free[stage], kConsumerWarps);
            }
            for (int stage = 0; stage < kStages; stage++) {
                barrier_init(&storage.key_full[stage], 1);
                barrier_init(&storage.key_free[stage], kConsumerWarps + (kFinishes ? 1 : 0));
                barrier_init(&storage.grad_out_full[stage], 1);
                barrier_init(&storage.grad_out_free[stage], kConsumerWarps);
                barrier_init(&storage.grads_full[stage], kConsumerWarps);
                if constexpr (kFinishes) barrier_init(&storage.added[stage], kConsumerWarps);
            }
            if constexpr (kFinishes) Step::Finish::init(storage.finish_barriers);
            barrier_init_fence();
        }
        __syncthreads();
        let_next_kernel_begin();
        await_kernel_before();
        if (threadIdx.x >= 32 * kConsumerWarps) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
            const int warp = warp_uniform(threadIdx.x / 32) - kConsumerWarps;
            if (warp == 0) produce(params, storage);
            if constexpr (kFinishes) {
                if (warp == 1) announce(params, storage);
                if (warp == 2) Step::Finish::run(params, storage.finish_tiles, storage.finish_barriers);
            }
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
            if (warp_uniform(threadIdx.x / 128) == 0) {
                consume<0>(params, storage);
            } else {
                consume<1>(params, storage);
            }
        }
    }
};

template <typename T, int kHeadDim, bool kRelativePosition>
__global__ void __launch_bounds__(384, 1) backward_fused(const __grid_constant__ BackwardParams params) {
    using Kernel = FusedBackward<T, kHeadDim, kRelativePosition>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
