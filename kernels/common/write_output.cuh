// The end of a block of queries: normalised rows go through shared memory to a clipped copy into the output tensor.
#pragma once

#include "../params.h"
#include "half_block.cuh"
#include "mbarrier.cuh"
#include "softmax.cuh"
#include "tma.cuh"
#include "token_grid.cuh"
#include "window.cuh"

namespace sparse_attn {

// Writes the first kHeadDim columns of a warpgroup's accumulators into a 128-byte-swizzled tile of chunks of 64 columns. `rows` is the
// address of the warpgroup's first row in chunk 0.
template <typename T, int kHeadDim, int kCount>
__device__ __forceinline__ void stage_rows(uint32_t rows, const float (&out)[kCount], const float (&factor)[2]) {
    static_assert(kHeadDim % 16 == 0, "stmatrix.x4 writes 16 columns");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int row = 16 * warp + lane % 16;
    const uint32_t line = rows + row * 128;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; i += 2) {
        const int column_group = i % 8 + lane / 16;
        const uint32_t address = line + (i / 8) * (kBlockTokens * 128) + ((column_group ^ (row % 8)) << 4);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            pairs[j] = pack<T>(out[4 * i + 2 * j] * factor[j % 2], out[4 * i + 2 * j + 1] * factor[j % 2]);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(pairs[0]),
                     "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                     : "memory");
    }
}

template <int kHeadDim>
__device__ __forceinline__ void store_chunks(const CUtensorMap* map, TileCoordinates at, const unsigned char* rows) {
#pragma unroll
    for (at.column = 0; at.column < kHeadDim; at.column += 64) {
        tma_store(map, rows + (at.column / 64) * (kBlockTokens * 128), at);
    }
}

// Copies half a block of a window row by row: a tile's slots beyond the window belong to its neighbours.
template <int kHeadDim>
__device__ __forceinline__ void store_rows_of_window(const ForwardParams& params, TileCoordinates at, const Origin& origin,
                                                     const unsigned char* rows) {
    const GridParams& grid = params.query_grid;
    const bool is_last = at.x + grid.tile_width >= grid.width;
    const int count = min(grid.height - at.y, grid.tile_height / 2);
    at.x += origin.x;
    at.y += origin.y;
    at.batch = origin.batch;
    for (int row = 0; row < count; row++, at.y++, rows += grid.tile_width * 128) {
        if (is_last) {
            store_chunks<kHeadDim>(&params.out.image, at, rows);
        } else {
            store_chunks<kHeadDim>(&params.windows.out_row, at, rows);
        }
    }
}

// Starts the copy of half a block; one thread calls it. `entry` is one of the batch, or a window.
template <int kHeadDim, bool kWindows>
__device__ __forceinline__ void store_rows(const ForwardParams& params, BlockCode query_block, int head, int entry,
                                           int half, const unsigned char* rows) {
    const TileCoordinates at = half_block_at(params.query_grid, query_block, half, head, entry);
    if (kWindows && params.windows.height > 0) {
        store_rows_of_window<kHeadDim>(params, at, origin_of<kWindows>(params, entry), rows);
    } else {
        with_map(params.out, query_block, [&](const CUtensorMap* map) { store_chunks<kHeadDim>(map, at, rows); });
    }
    tma_store_commit();
}

// Of the block's slots `slot` and 8 below.
__device__ __forceinline__ void write_log_sum(const ForwardParams& params, const BlockPlace& place, int head, int batch,
                                              int slot, const float (&log_sum)[2]) {
    if (threadIdx.x % 4 != 0) return;
    const GridParams& grid = params.query_grid;
    const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
    float* lse = params.lse + (int64_t(batch) * params.query_heads + head) * tokens;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int of_row = slot + 8 * half;
        if (place.exists(of_row)) lse[place.token(of_row)] = log_sum[half];
    }
}

}  // namespace sparse_attn
