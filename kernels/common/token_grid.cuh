// Where a block of tokens lies: which part of the tensor, at which coordinates, and how much of it exists.
#pragma once

#include "../params.h"
#include "tma.cuh"

namespace sparse_attn {

// A block's part of the tensor and its tile's column and row there, packed. Made once per list entry, because finding it
// is costly; everything else about a block follows by shifts. Never negative.
using BlockCode = int;
constexpr int kCodeRowShift = 16, kCodePartShift = 29;
constexpr int kMaxTileColumns = 1 << kCodeRowShift, kMaxTileRows = 1 << (kCodePartShift - kCodeRowShift);
enum Part { kImage = 0, kPrefix = 1, kSuffix = 2 };

__device__ __forceinline__ BlockCode code_of_block(const GridParams& grid, int block) {
    const int tile = block - grid.prefix_blocks;
    if (tile < 0) return kPrefix << kCodePartShift | block;
    if (tile >= grid.tile_blocks) return kSuffix << kCodePartShift | (tile - grid.tile_blocks);
    const int row = grid.tile_columns == 1 ? tile : int(__umulhi(tile, grid.tile_columns_reciprocal));
    return row << kCodeRowShift | (tile - row * grid.tile_columns);
}

__device__ __forceinline__ Part part_of(BlockCode code) { return Part(code >> kCodePartShift); }

// Coordinates of the block's first token in its part of the tensor.
__device__ __forceinline__ int x_of(const GridParams& grid, BlockCode code) {
    const int column = code & (kMaxTileColumns - 1);
    return part_of(code) == kImage ? column << grid.tile_width_log2 : column * kBlockTokens;
}
__device__ __forceinline__ int y_of(const GridParams& grid, BlockCode code) {
    return part_of(code) == kImage ? (code >> kCodeRowShift) << grid.tile_height_log2 : 0;
}

// Which of a block's slots exist, and which tokens they are.
struct BlockPlace {
    int valid_x, valid_y;       // extent that exists
    int first_token, row_step;  // token index of the first slot, and tokens from one row to the next
    int width_log2;             // slots per row

    __device__ __forceinline__ BlockPlace(const GridParams& grid, BlockCode code) {
        const int x = x_of(grid, code), y = y_of(grid, code);
        if (part_of(code) == kImage) {
            valid_x = min(grid.width - x, 1 << grid.tile_width_log2);
            valid_y = min(grid.height - y, 1 << grid.tile_height_log2);
            first_token = grid.prefix + y * grid.width + x;
            row_step = grid.width;
            width_log2 = grid.tile_width_log2;
        } else {
            const bool is_prefix = part_of(code) == kPrefix;
            valid_x = min((is_prefix ? grid.prefix : grid.suffix) - x, kBlockTokens);
            valid_y = 1;
            first_token = x + (is_prefix ? 0 : grid.prefix + grid.height * grid.width);
            row_step = 0;
            width_log2 = kBlockTokensLog2;
        }
    }

    __device__ __forceinline__ int row(int slot) const { return slot >> width_log2; }
    __device__ __forceinline__ int column(int slot) const { return slot & ((1 << width_log2) - 1); }
    __device__ __forceinline__ bool exists(int slot) const { return row(slot) < valid_y && column(slot) < valid_x; }
    __device__ __forceinline__ int token(int slot) const { return first_token + row(slot) * row_step + column(slot); }
    __device__ __forceinline__ bool is_full() const { return valid_x * valid_y == kBlockTokens; }
};

// Calls `copy` with the tensor map of a block's part. Each part has a call of its own, so that the map's address is a
// constant there, as the copy instruction wants it.
template <typename Copy>
__device__ __forceinline__ void with_map(const TensorMaps& maps, BlockCode code, const Copy& copy) {
    if (part_of(code) == kImage) {
        copy(&maps.image);
    } else if (part_of(code) == kPrefix) {
        copy(&maps.prefix);
    } else {
        copy(&maps.suffix);
    }
}

// Fetches part of a block into chunks of 64 columns; called by a whole warp.
template <int kChunks>
__device__ __forceinline__ void load_chunks(unsigned char* tile, int chunk_bytes, const TensorMaps& maps, BlockCode block,
                                            TileCoordinates at, uint64_t* full) {
    with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++) {
            at.column = 64 * chunk;
            tma_load(tile + chunk * chunk_bytes, map, at, full);
        }
    });
}

// The first of the two query rows (the second lies 8 below) that a consumer thread holds in its accumulators.
__device__ __forceinline__ int query_row_of_thread() { return threadIdx.x / 32 % 8 * 16 + threadIdx.x % 32 / 4; }

}  // namespace sparse_attn
