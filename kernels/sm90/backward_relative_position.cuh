// What runs beside the fused kernel's other helpers if there is a relative position: before it, the table of offsets and an
// empty workspace; after it, the workspace's sums as gradients. None of it depends on head_dim.
#pragma once

#include "../common/fused_relative_position.cuh"
#include "../common/overlapping_launch.cuh"
#include "../common/tma.cuh"

namespace sparse_attn {

// A thread block of 128 threads per half block of queries, after their statistics are known.
template <typename T>
struct PrepareRelativePosition {
    static constexpr int kThreads = 128;
    static constexpr int kRows = 64;  // of keys, that arrive together
    static_assert(kOffsetsOfHalf == kThreads, "a vector of offsets for each thread");

    struct Storage {
        alignas(1024) unsigned char rel_h[kHalfBlockTokens * kRows * sizeof(T)];
        uint64_t full;
    };

    static __device__ __forceinline__ void run(const BackwardParams& params, Storage& storage) {
        let_next_kernel_begin();
        const int half = blockIdx.x % 2, head = gridDim.y - 1 - blockIdx.y, batch = gridDim.z - 1 - blockIdx.z;
        const BlockCode block = warp_uniform(code_of_block(params.query_grid, blockIdx.x / 2));
        const int any_half_block = (batch * params.query_heads + head) * gridDim.x + blockIdx.x;
        const int tiles = rows_of_tiles(params.key_grid);
        if (threadIdx.x == 0) {
            barrier_init(&storage.full, 1);
            barrier_init_fence();
        }
        __syncthreads();
        const auto load = [&](int first_row) {
            TileCoordinates at = half_block_at(params.query_grid, block, half, head, batch);
            at.column = first_row;
            barrier_arrive_expect(&storage.full, sizeof(storage.rel_h));
            with_map(params.rel_h, block, [&](const CUtensorMap* map) { tma_load(storage.rel_h, map, at, &storage.full); });
        };
        if (threadIdx.x < 32) load(0);

        float4* const sums = place_sums_of_thread(params, any_half_block);
        const int groups = groups_of_places(params.key_grid);
        for (int i = 0; i < groups; i++) sums[i * kThreads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

        await_kernel_before();  // which writes the statistics
        // This thread's row of a tile of keys, and the first of its four queries.
        const int row = threadIdx.x / 16, query = threadIdx.x / 4 % 4 * 16 + threadIdx.x % 4 * 2;
        const auto statistics = reinterpret_cast<const PairStatistics*>(params.statistics) + int64_t(any_half_block) * 32;
        const float2 first = statistics[query / 2].offset, second = statistics[query / 2 + 4].offset;
        float4* const table = offsets_of_half(params, any_half_block, 0) + threadIdx.x;
        const auto write = [&](int tile, float4 bias) {
            table[tile * (2 * kOffsetsOfHalf)] = {fmaf(bias.x, -kLog2E, first.x), fmaf(bias.y, -kLog2E, first.y),
                                                  fmaf(bias.z, -kLog2E, second.x), fmaf(bias.w, -kLog2E, second.y)};
        };
        const auto bias_of = [&](int query, int tile) {
            const int at = query * 128 + ((tile ^ query % 8) << 4) + 2 * row;
            return float(*reinterpret_cast<const T*>(storage.rel_h + at));
        };
        if (rows_of_offsets(params.key_grid) > tiles) write(tiles, {0.0f, 0.0f, 0.0f, 0.0f});
        uint32_t parity = 0;
        for (int done = 0; done < tiles; done += kRows / kBiasTileHeight) {
            barrier_wait(&storage.full, parity);
            parity ^= 1;
#pragma unroll
            for (int i = 0; i < kRows / kBiasTileHeight; i++) {
                if (done + i < tiles) {
                    write(done + i, {bias_of(query, i), bias_of(query + 1, i), bias_of(query + 8, i), bias_of(query + 9, i)});
                }
            }
            if (done + kRows / kBiasTileHeight >= tiles) break;
            __syncthreads();
            if (threadIdx.x < 32) load((done + kRows / kBiasTileHeight) * kBiasTileHeight);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(128) prepare_relative_position(const __grid_constant__ BackwardParams params) {
    using Kernel = PrepareRelativePosition<T>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

// A thread block of 128 threads per half block of queries: rows of gradients, as far as queries and keys exist.
template <typename T>
struct FinishRelativePosition {
    static constexpr int kThreads = 128;

    static __device__ __forceinline__ void run(const BackwardParams& params) {
        const GridParams& grid = params.query_grid;
        const int head = gridDim.y - 1 - blockIdx.y, batch = gridDim.z - 1 - blockIdx.z;
        const int64_t any_head = int64_t(batch) * params.query_heads + head;
        const BlockPlace queries(grid, code_of_block(grid, blockIdx.x / 2));
        const int64_t first_token = any_head * (grid.prefix + int64_t(grid.height) * grid.width + grid.suffix);
        const int slot = blockIdx.x % 2 * kHalfBlockTokens + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        int64_t tokens[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tokens[i] = queries.exists(slot + 8 * i) ? first_token + queries.token(slot + 8 * i) : -1;
        }
        const float4* const sums = place_sums_of_thread(params, int(any_head) * gridDim.x + blockIdx.x);
        const int row_groups = rows_of_tiles(params.key_grid);
        await_kernel_before();
        write(static_cast<T*>(params.grad_rel_h), tokens, sums, row_groups, params.key_grid.height);
        write(static_cast<T*>(params.grad_rel_w), tokens, sums + row_groups * kThreads,
              groups_of_places(params.key_grid) - row_groups, params.key_grid.width);
    }

    // Two columns of each group for either of this thread's queries.
    static __device__ __forceinline__ void write(T* gradient, const int64_t (&tokens)[2], const float4* sums, int groups,
                                                 int length) {
        constexpr int kTogether = 8;  // groups that are read before any is written
        const int lane = threadIdx.x % 4;
        for (int first = 0; first < groups; first += kTogether) {
            float4 values[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                if (first + i < groups) values[i] = __ldcs(&sums[(first + i) * kThreads]);
            }
            if (length % 8 == 0) {
                // Of four groups, each lane of four gets one whole, which is 16 bytes.
#pragma unroll
                for (int i = 0; i < kTogether; i += 4) {
                    if (first + i >= groups) break;
                    const int column = 8 * (first + i + lane);
#pragma unroll
                    for (int query = 0; query < 2; query++) {
                        uint32_t pairs[4];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const float4& four = values[i + j];
                            pairs[j] = query == 0 ? pack<T>(four.x, four.y) : pack<T>(four.z, four.w);
                        }
                        transpose_among_four(pairs, lane);
                        if (tokens[query] < 0 || column >= length) continue;
                        *reinterpret_cast<uint4*>(gradient + tokens[query] * length + column) =
                            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
                    }
                }
                continue;
            }
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                const int column = 8 * (first + i) + 2 * lane;
                if (first + i >= groups || column >= length) continue;
                write_pair(gradient, tokens[0], column, length, values[i].x, values[i].y);
                write_pair(gradient, tokens[1], column, length, values[i].z, values[i].w);
            }
        }
    }

    // Element j of lane i becomes element i of lane j.
    static __device__ __forceinline__ void transpose_among_four(uint32_t (&x)[4], int lane) {
#pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2) {
            const bool is_upper = lane & bit;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i & bit) continue;
                const uint32_t got = __shfl_xor_sync(0xffffffff, is_upper ? x[i] : x[i | bit], bit);
                if (is_upper) {
                    x[i] = got;
                } else {
                    x[i | bit] = got;
                }
            }
        }
    }

    static __device__ __forceinline__ void write_pair(T* gradient, int64_t token, int column, int length, float x, float y) {
        if (token < 0) return;
        T* const to = gradient + token * length + column;
        if (length % 2 == 0) {
            *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
        } else {
            to[0] = T(x);
            if (column + 1 < length) to[1] = T(y);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(128) finish_relative_position(const __grid_constant__ BackwardParams params) {
    FinishRelativePosition<T>::run(params);
}

}  // namespace sparse_attn
