// All gradients in one pass for head_dim up to 64: five products per pair of blocks instead of the pair of kernels' seven.
//
// A thread block owns 128 keys, two warpgroups of 64, and walks over the blocks of queries that attend to them. dK and dV
// stay in registers; dQ, which every block of keys adds to, goes to a float32 workspace by vector reductions, in an order
// of additions that differs from run to run.
//
//   first half of a step     dP and dV on the tensor cores | dS, from dP
//   second half              S of the next step, dQ of the last one and dK of this one | exponentials, from S
//
// The warpgroups take turns at the exponentials, which keeps one in the first half while the other is in the second, so
// that the tensor cores always have work. dQ needs the dS of both, hence comes a step later, when both are surely there.
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
    static_assert(kHeadDim <= 64, "one 64-wide chunk per tile; wider heads do not fit in registers");
    static constexpr int kConsumerWarps = 8;
    static constexpr int kThreads = 128 + 32 * kConsumerWarps;
    static constexpr int kQueryStages = 3, kGradOutStages = 2, kGradStages = 3;
    static constexpr int kConsumersBarrier = 6;
    static constexpr int kHalfBytes = kHalfBlockTokens * 128;
    static constexpr int kTileBytes = kBlockTokens * 128;

    struct Storage {
        alignas(1024) unsigned char key[kTileBytes];    // holds its gradient at the end
        alignas(1024) unsigned char value[kTileBytes];  // likewise
        alignas(1024) unsigned char query[kQueryStages][kTileBytes];
        alignas(1024) unsigned char grad_out[kGradOutStages][kTileBytes];
        alignas(1024) unsigned char grads[kGradStages][2][kTileBytes];  // dS, each warpgroup's 64 keys in a chunk of their own
        alignas(16) PairStatistics statistics[kQueryStages][kBlockTokens / 2];
        int any_block[kQueryStages];  // of queries: its number over all batch entries and heads
        uint64_t key_full, query_full[kQueryStages], grad_out_full[kGradOutStages];
        uint64_t query_free[kQueryStages], grad_out_free[kGradOutStages], grads_full[kGradStages];
    };
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // Copies are issued by a whole warp.
    static __device__ __forceinline__ void load(unsigned char* tile, const TensorMaps& maps, const GridParams& grid,
                                                BlockCode block, int head, int batch, uint64_t* full) {
        with_map(maps, block, [&](const CUtensorMap* map) {
            tma_load(tile, map, half_block_at(grid, block, 0, head, batch), full);
            tma_load(tile + kHalfBytes, map, half_block_at(grid, block, 1, head, batch), full);
        });
    }

    static __device__ __forceinline__ void load_query(Storage& storage, const BackwardParams& params, BlockCode block,
                                                      int head, int batch, int stage) {
        const int number = block_of_code(params.query_grid, block);
        if (threadIdx.x % 32 == 0) {
            storage.any_block[stage] = (batch * params.query_heads + head) * params.query_grid.num_blocks + number;
        }
        uint64_t* full = &storage.query_full[stage];
        barrier_arrive_expect(full, kTileBytes + sizeof(storage.statistics[0]));
        load(storage.query[stage], params.query, params.query_grid, block, head, batch, full);
        load_statistics<2>(storage.statistics[stage], params, 2 * number, head, batch, full);
    }

    // The producer warp runs ahead as far as the rings reach.
    static __device__ __forceinline__ void produce(const BackwardParams& params, Storage& storage, int total) {
        const int key_block = blockIdx.x, key_head = blockIdx.y, batch = blockIdx.z;
        const BlockCode key_code = warp_uniform(code_of_block(params.key_grid, key_block));
        barrier_arrive_expect(&storage.key_full, 2 * kTileBytes);
        load(storage.key, params.key, params.key_grid, key_code, key_head, batch, &storage.key_full);
        QueryList list;
        list.open(params, key_block, key_head, batch);
        for (int step = 0; step < total; step++) {
            const int stage = step % kQueryStages, grad_stage = step % kGradOutStages;
            const BlockCode block = list.next(params);
            barrier_wait(&storage.query_free[stage], step / kQueryStages % 2 ^ 1);
            load_query(storage, params, block, list.head, batch, stage);
            if (step == 0) load(storage.value, params.value, params.key_grid, key_code, key_head, batch, &storage.key_full);
            uint64_t* full = &storage.grad_out_full[grad_stage];
            barrier_wait(&storage.grad_out_free[grad_stage], step / kGradOutStages % 2 ^ 1);
            barrier_arrive_expect(full, kTileBytes);
            load(storage.grad_out[grad_stage], params.grad_out, params.query_grid, block, list.head, batch, full);
        }
    }

    static __device__ __forceinline__ void issue_scores(float (&scores)[64], int keys, int queries) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; step++) {
            const uint64_t a = tile_descriptor(keys + step * kDepthStepAlongRows);
            const uint64_t b = tile_descriptor(queries + step * kDepthStepAlongRows);
            if (step == 0) {
                wgmma_scores<T, 128, false>(scores, a, b);
            } else {
                wgmma_scores<T, 128, true>(scores, a, b);
            }
        }
        wgmma_commit();
    }

    static __device__ __forceinline__ void issue_gradient(float (&gradient)[kHeadDim / 2], const uint32_t (&a)[8][4],
                                                          int queries) {
#pragma unroll
        for (int step = 0; step < 8; step++) {
            wgmma_output<T, kHeadDim>(gradient, a[step], tile_descriptor(queries + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    // dK += dS^T Q, from the dS that the warpgroup has written.
    static __device__ __forceinline__ void issue_grad_key(float (&gradient)[kHeadDim / 2], int grads, int queries) {
#pragma unroll
        for (int step = 0; step < 8; step++) {
            wgmma_shared_output<T, kHeadDim, true, true>(gradient, tile_descriptor(grads + step * kDepthStepDownRows),
                                                         tile_descriptor(queries + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    static __device__ __forceinline__ void issue_grad_query(float (&gradient)[kHeadDim / 2], int grads, int keys) {
#pragma unroll
        for (int step = 0; step < 8; step++) {
            const uint64_t a = tile_descriptor(grads + step / 4 * (kTileBytes >> 4) + step % 4 * kDepthStepAlongRows);
            const uint64_t b = tile_descriptor(keys + step * kDepthStepDownRows);
            if (step == 0) {
                wgmma_shared_output<T, kHeadDim, false>(gradient, a, b);
            } else {
                wgmma_shared_output<T, kHeadDim, true>(gradient, a, b);
            }
        }
        wgmma_commit();
    }

    // exp2(scale_log2 s - L), packed; keys that do not exist get 0.
    static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[8][4], const float (&scores)[64],
                                                        const PairStatistics* statistics, float scale_log2,
                                                        const uint32_t (&exists)[2]) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 offset = statistics[4 * i + threadIdx.x % 4].offset;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float x = exp2_approximate(fmaf(scores[4 * i + 2 * j], scale_log2, -offset.x));
                const float y = exp2_approximate(fmaf(scores[4 * i + 2 * j + 1], scale_log2, -offset.y));
                weights[i / 2][i % 2 * 2 + j] = pack<T>(x, y) & exists[j];
            }
        }
    }

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        const int total = QueryList::length(params, blockIdx.x, blockIdx.y, blockIdx.z);
        if (threadIdx.x == 0) {
            barrier_init(&storage.key_full, 1);
            for (int stage = 0; stage < kQueryStages; stage++) {
                barrier_init(&storage.query_full[stage], 1);
                barrier_init(&storage.query_free[stage], kConsumerWarps);
            }
            for (int stage = 0; stage < kGradOutStages; stage++) {
                barrier_init(&storage.grad_out_full[stage], 1);
                barrier_init(&storage.grad_out_free[stage], kConsumerWarps);
            }
            for (int stage = 0; stage < kGradStages; stage++) barrier_init(&storage.grads_full[stage], kConsumerWarps);
            barrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x >= 32 * kConsumerWarps) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            if (threadIdx.x < 32 * (kConsumerWarps + 1) && total > 0) produce(params, storage, total);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
            consume(params, storage, total);
        }
    }

    // Waits for both warpgroups.
    static __device__ __forceinline__ void consumers_sync() {
        asm volatile("bar.sync %0, %1;" ::"n"(kConsumersBarrier), "n"(32 * kConsumerWarps) : "memory");
    }

    static __device__ __forceinline__ void consume(const BackwardParams& params, Storage& storage, int total) {
        const int warpgroup = warp_uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
        const int key_head = blockIdx.y, batch = blockIdx.z;
        const BlockCode key_code = warp_uniform(code_of_block(params.key_grid, blockIdx.x));
        if (warpgroup == 1 && total > 0) give_turn(0);
        uint32_t exists[2];
        existing_keys_of_thread(exists, params, key_code, batch);

        float grad_key[kHeadDim / 2], grad_value[kHeadDim / 2];
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) grad_key[i] = grad_value[i] = 0.0f;
        if (total > 0) {
            const int own_keys = tile_along_rows(storage.key + warpgroup * kHalfBytes);
            const int own_values = tile_along_rows(storage.value + warpgroup * kHalfBytes);
            const int all_keys = tile_down_rows(storage.key, kTileBytes);
            uint32_t weights[8][4];
            float grads[64];
            barrier_wait(&storage.key_full, 0);
            barrier_wait(&storage.query_full[0], 0);
            barrier_wait(&storage.grad_out_full[0], 0);
            {
                float scores[64];
                wgmma_fence();
                issue_scores(scores, own_keys, tile_along_rows(storage.query[0]));
                issue_scores(grads, own_values, tile_along_rows(storage.grad_out[0]));
                wgmma_wait<1>(scores);
                await_turn(warpgroup);
                exponentiate(weights, scores, storage.statistics[0], params.scale_log2, exists);
                give_turn(warpgroup ^ 1);
                wgmma_wait<0>(grads);
            }
            int any_block = 0;  // of the step before
            // Queries and dS have rings of three.
            static_assert(kQueryStages == kGradStages, "the same place in both rings");
            int stage = 0;
            uint32_t parity = 0;
            for (int step = 0; step < total; step++) {
                const int grad_stage = step % kGradOutStages;
                const int next = stage + 1 == kQueryStages ? 0 : stage + 1, before = stage == 0 ? kQueryStages - 1 : stage - 1;
                // Of the step before the last, whose place in the rings the next step has.
                const uint32_t parity_of_next = next == 0 ? parity : parity ^ 1;
                const uint32_t parity_before = stage == 0 ? parity ^ 1 : parity;

                // The first step computes a dQ that nobody adds.
                float grad_query[kHeadDim / 2];
                if (step > 0) barrier_wait(&storage.grads_full[before], parity_before);
                pin_registers(grad_value);
                pin_operands(weights);
                wgmma_fence();
                issue_gradient(grad_value, weights, tile_down_rows(storage.grad_out[grad_stage], kTileBytes));
                issue_grad_query(grad_query, tile_along_rows(storage.grads[before][0] + warpgroup * kHalfBytes), all_keys);
                uint32_t packed_grads[8][4];
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const float2 delta = storage.statistics[stage][4 * i + lane % 4].delta;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        packed_grads[i / 2][i % 2 * 2 + j] =
                            score_gradient<T>(weights[i / 2][i % 2 * 2 + j], grads[4 * i + 2 * j] - delta.x,
                                              grads[4 * i + 2 * j + 1] - delta.y);
                    }
                }
                // Its last readers were the dQ of three steps ago, issued in the step before the last.
                if (step > 1) barrier_wait(&storage.query_free[next], parity_of_next);
                stage_transposed(storage.grads[stage][warpgroup], packed_grads);
                fence_async_proxy();
                wgmma_wait<0>(grad_value);
                pin_registers(grad_query);
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(&storage.grads_full[stage]);
                    barrier_arrive(&storage.grad_out_free[grad_stage]);
                }
                const int this_block = storage.any_block[stage];
                if (step > 0) add_to_query_sums<kHeadDim>(params.grad_query_sums, 2 * any_block + warpgroup, grad_query);
                any_block = this_block;
                warpgroup_sync(warpgroup);

                // The last step computes scores again that nobody reads.
                const bool last = step + 1 == total;
                const int ahead = last ? stage : next, grad_ahead = last ? grad_stage : grad_stage ^ 1;
                const uint32_t ahead_parity = ahead == 0 && !last ? parity ^ 1 : parity;
                barrier_wait(&storage.query_full[ahead], ahead_parity);
                barrier_wait(&storage.grad_out_full[grad_ahead], (last ? step : step + 1) / kGradOutStages % 2);
                float scores[64];
                pin_registers(grad_key);
                wgmma_fence();
                issue_scores(scores, own_keys, tile_along_rows(storage.query[ahead]));
                issue_scores(grads, own_values, tile_along_rows(storage.grad_out[grad_ahead]));
                issue_grad_key(grad_key, tile_down_rows(storage.grads[stage][warpgroup], kTileBytes),
                               tile_down_rows(storage.query[stage], kTileBytes));
                wgmma_wait<2>(scores);
                await_turn(warpgroup);
                exponentiate(weights, scores, storage.statistics[ahead], params.scale_log2, exists);
                // Long done; but the compiler, which would wait for dK before the exponentials, does not look past it.
                pin_operands(weights);
                barrier_wait(&storage.query_full[ahead], ahead_parity);
                give_turn(warpgroup ^ 1);
                wgmma_wait<0>(grads);
                pin_registers(grad_key);
                __syncwarp();
                if (lane == 0) barrier_arrive(&storage.query_free[stage]);
                stage = next;
                if (stage == 0) parity ^= 1;
            }
            const int before = stage == 0 ? kQueryStages - 1 : stage - 1;
            barrier_wait(&storage.grads_full[before], stage == 0 ? parity ^ 1 : parity);
            float grad_query[kHeadDim / 2];
            wgmma_fence();
            issue_grad_query(grad_query, tile_along_rows(storage.grads[before][0] + warpgroup * kHalfBytes), all_keys);
            wgmma_wait<0>(grad_query);
            add_to_query_sums<kHeadDim>(params.grad_query_sums, 2 * any_block + warpgroup, grad_query);
        }
        consumers_sync();
        end(params, storage, key_code, key_head, batch, warpgroup, grad_key, grad_value);
    }

    // Bits of the packed weights of this thread's two keys that may stay.
    static __device__ __forceinline__ void existing_keys_of_thread(uint32_t (&exists)[2], const BackwardParams& params,
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

    // dS^T of a warpgroup's keys goes transposed into a tile of queries, as the product with the keys takes it.
    static __device__ __forceinline__ void stage_transposed(unsigned char* tile, const uint32_t (&grads)[8][4]) {
        const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
        const int column_group = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
        const uint32_t address = shared_address(tile) + row * 128 + ((column_group ^ (row % 8)) << 4);
#pragma unroll
        for (int step = 0; step < 8; step++) {
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address + step * 2048),
                         "r"(grads[step][0]), "r"(grads[step][1]), "r"(grads[step][2]), "r"(grads[step][3])
                         : "memory");
        }
    }

    static __device__ __forceinline__ void end(const BackwardParams& params, Storage& storage, BlockCode key_block,
                                               int head, int batch, int warpgroup, const float (&grad_key)[kHeadDim / 2],
                                               const float (&grad_value)[kHeadDim / 2]) {
        unsigned char* const key = storage.key + warpgroup * kHalfBytes;
        unsigned char* const value = storage.value + warpgroup * kHalfBytes;
        const bool kept[2] = {true, true};
        stage_half_block<T, kHeadDim>(key, grad_key, params.scale, kept);
        stage_half_block<T, kHeadDim>(value, grad_value, 1.0f, kept);
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (threadIdx.x % 128 != 0) return;
        const TileCoordinates at = half_block_at(params.key_grid, key_block, warpgroup, head, batch);
        with_map(params.grad_key, key_block, [&](const CUtensorMap* map) { tma_store(map, key, at); });
        with_map(params.grad_value, key_block, [&](const CUtensorMap* map) { tma_store(map, value, at); });
        tma_store_commit();
        tma_store_wait_read();
    }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(384, 1) backward_fused(const __grid_constant__ BackwardParams params) {
    using Kernel = FusedBackward<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
