// Where a block of tokens lies: which part of the tensor, at which coordinates, and how much of it exists.
#pragma once

#include "../params.h"
#include "tma.cuh"

namespace sparse_attn {

struct BlockPlace {
    int x, y;                   // of its first token, in its part of the tensor
    int valid_x, valid_y;       // extent that exists, from there
    int first_token, row_step;  // token index of (x, y), and tokens from one row to the next
    int width_log2;             // tokens per row of the block
    bool is_image;

    __device__ __forceinline__ int row(int slot) const { return slot >> width_log2; }
    __device__ __forceinline__ int column(int slot) const { return slot & ((1 << width_log2) - 1); }
    __device__ __forceinline__ bool exists(int slot) const { return row(slot) < valid_y && column(slot) < valid_x; }
    __device__ __forceinline__ int token(int slot) const { return first_token + row(slot) * row_step + column(slot); }
    __device__ __forceinline__ bool is_full() const { return valid_x * valid_y == kBlockTokens; }
};

__device__ __forceinline__ BlockPlace place_of_block(const GridParams& grid, int block) {
    BlockPlace place;
    const int tile = block - grid.prefix_blocks;
    if (static_cast<unsigned>(tile) < static_cast<unsigned>(grid.tile_blocks)) {
        const int tile_row = tile / grid.tile_columns;
        place.y = tile_row * grid.tile_height;
        place.x = (tile - tile_row * grid.tile_columns) * grid.tile_width;
        place.valid_x = min(grid.width - place.x, grid.tile_width);
        place.valid_y = min(grid.height - place.y, grid.tile_height);
        place.first_token = grid.prefix + place.y * grid.width + place.x;
        place.row_step = grid.width;
        place.width_log2 = grid.tile_width_log2;
        place.is_image = true;
    } else {
        const bool is_prefix = tile < 0;
        place.y = 0;
        place.x = (is_prefix ? block : tile - grid.tile_blocks) * kBlockTokens;
        place.valid_x = min((is_prefix ? grid.prefix : grid.suffix) - place.x, kBlockTokens);
        place.valid_y = 1;
        place.first_token = place.x + (is_prefix ? 0 : grid.prefix + grid.height * grid.width);
        place.row_step = 0;
        place.width_log2 = 7;
        place.is_image = false;
    }
    return place;
}

// The first of the two query rows (the second lies 8 below) that a consumer thread holds in its accumulators.
__device__ __forceinline__ int query_row_of_thread() { return threadIdx.x / 32 % 8 * 16 + threadIdx.x % 32 / 4; }

__device__ __forceinline__ const CUtensorMap* map_of_block(const TensorMaps& maps, const GridParams& grid, int block) {
    const int tile = block - grid.prefix_blocks;
    return tile < 0 ? &maps.prefix : tile < grid.tile_blocks ? &maps.image : &maps.suffix;
}

}  // namespace sparse_attn
