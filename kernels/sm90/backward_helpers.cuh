// What runs before and after the fused kernel: statistics and an empty workspace; the workspace's sums as gradients.
#pragma once

#include "../common/half_block.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/query_statistics.cuh"
#include "../common/query_sums.cuh"
#include "../common/tma.cuh"

namespace sparse_attn {

// A thread block of 128 threads per half block of queries: delta = rowsum(dO O) less the gradient of the log-sum-exp.
template <typename T, int kHeadDim>
struct PrepareBackward {
    static constexpr int kThreads = 128;
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kChunkBytes = kHalfBlockTokens * 128;

    struct Storage {
        alignas(1024) unsigned char grad_out[kChunks][kChunkBytes];
        alignas(1024) unsigned char out[kChunks][kChunkBytes];
        uint64_t full;
    };

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        let_next_kernel_begin();
        const GridParams& grid = params.query_grid;
        const int half = blockIdx.x % 2, head = gridDim.y - 1 - blockIdx.y, batch = gridDim.z - 1 - blockIdx.z;
        const BlockCode block = warp_uniform(code_of_block(grid, blockIdx.x / 2));
        const int64_t any_head = int64_t(batch) * params.query_heads + head;
        const int64_t any_half_block = any_head * gridDim.x + blockIdx.x;
        if (threadIdx.x == 0) {
            if (any_half_block == 0) *params.blocks_taken = 0;
            if (blockIdx.x == 0) params.key_blocks_added[any_head / params.heads_per_key_head] = 0;
            params.finished[any_half_block] = 0;
            barrier_init(&storage.full, 1);
            barrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const TileCoordinates at = half_block_at(grid, block, half, head, batch);
            barrier_arrive_expect(&storage.full, 2 * kChunks * kChunkBytes);
            load_chunks<kChunks>(storage.grad_out[0], kChunkBytes, params.grad_out, block, at, &storage.full);
            load_chunks<kChunks>(storage.out[0], kChunkBytes, params.out, block, at, &storage.full);
        }
        float4* const sums = query_sums_of_thread<kHeadDim>(params.grad_query_sums, int(any_half_block));
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; i++) sums[i * 128] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

        // Two threads share a row: one writes L, the other delta.
        const int row = threadIdx.x / 2, part = threadIdx.x % 2, slot = half * kHalfBlockTokens + row;
        const BlockPlace place(grid, block);
        const bool exists = place.exists(slot);
        float offset = INFINITY, grad_lse = 0.0f;
        if (exists) {
            const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
            const int64_t at = any_head * tokens + place.token(slot);
            if (params.grad_lse != nullptr) grad_lse = params.grad_lse[at];
            const float lse = params.lse[at];
            if (lse != -INFINITY) offset = lse * kLog2E;
        }
        barrier_wait(&storage.full, 0);
        float delta = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = row * 128 + (((4 * part + i) ^ (row % 8)) << 4);
                delta += dot<T>(*reinterpret_cast<const uint4*>(storage.grad_out[chunk] + at),
                                *reinterpret_cast<const uint4*>(storage.out[chunk] + at));
            }
        }
        delta += __shfl_xor_sync(0xffffffff, delta, 1);
        delta = offset == INFINITY ? 0.0f : delta - grad_lse;
        float* const statistics = params.statistics + any_half_block * (2 * kHalfBlockTokens);
        statistics[row / 2 * 4 + 2 * part + row % 2] = part == 0 ? offset : delta;
    }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128) prepare_backward(const __grid_constant__ BackwardParams params) {
    using Kernel = PrepareBackward<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

// A thread block of 128 threads per half block of queries: dQ = scale * sums, unless the fused kernel has done it.
template <typename T, int kHeadDim>
struct FinishQueryGradient {
    static constexpr int kThreads = 128;
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kChunkBytes = kHalfBlockTokens * 128;

    struct Storage {
        alignas(1024) unsigned char tile[kChunks * kChunkBytes];
    };

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        let_next_kernel_begin();
        const GridParams& grid = params.query_grid;
        const int head = gridDim.y - 1 - blockIdx.y, batch = gridDim.z - 1 - blockIdx.z;
        const BlockCode block = warp_uniform(code_of_block(grid, blockIdx.x / 2));
        const int any_half_block = (batch * params.query_heads + head) * gridDim.x + blockIdx.x;
        const float4* const sums = query_sums_of_thread<kHeadDim>(params.grad_query_sums, any_half_block);
        float values[kHeadDim / 2];
        await_kernel_before();
        if (params.finished[any_half_block] != 0) return;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; i++) {
            const float4 four = __ldcs(&sums[i * 128]);
            values[4 * i] = four.x;
            values[4 * i + 1] = four.y;
            values[4 * i + 2] = four.z;
            values[4 * i + 3] = four.w;
        }
        stage_half_block<T, kHeadDim>(storage.tile, values, params.scale);
        fence_async_proxy();
        __syncthreads();
        if (threadIdx.x != 0) return;
        store_half_block<kChunks>(params.grad_query, grid, block, blockIdx.x % 2, head, batch, storage.tile, kChunkBytes);
        tma_store_wait_read();
    }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128) finish_query_gradient(const __grid_constant__ BackwardParams params) {
    using Kernel = FinishQueryGradient<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
