// Where a part of a block lies, and how much of it exists.
#pragma once

#include "params.h"

namespace sparse_attn {

// Token `slot` of a part, below kPartTokens, lies at row slot >> width_log2 and column slot & ((1 << width_log2) - 1).
struct Part {
    int first;          // token
    int row_step;       // tokens from one row to the next
    int width_log2;
    int height, width;  // how much of the part exists

    __device__ __forceinline__ int count() const { return height * width; }

    // Whole parts are judged by a quarter of their tokens, spread evenly; those cut off at an edge by all they have.
    __device__ __forceinline__ int samples() const { return count() == kPartTokens ? kPartTokens / 4 : kPartTokens; }

    // Slot of sample `index`.
    __device__ __forceinline__ int slot(int index) const {
        if (count() < kPartTokens) return index;
        const int per_row_log2 = width_log2 - 2;
        if (per_row_log2 < 0) return 4 * index;
        const int y = index >> per_row_log2, x = index & ((1 << per_row_log2) - 1);
        return (y << width_log2) + 4 * x + 2 * (y & 1);  // every fourth of a row, two further in every other row
    }
};

__device__ __forceinline__ int clamp_to(int value, int most) { return max(0, min(value, most)); }

__device__ __forceinline__ Part part_of_block(const GridParams& grid, const CutParams& cut, int block, int part) {
    const int tile = block - grid.prefix_blocks;
    if (tile >= 0 && tile < grid.tile_blocks) {
        const int row = tile / grid.tile_columns, column = tile - row * grid.tile_columns;
        const int height_log2 = grid.tile_height_log2 - cut.rows_log2, width_log2 = grid.tile_width_log2 - cut.columns_log2;
        const int y = (row << grid.tile_height_log2) + ((part >> cut.columns_log2) << height_log2);
        const int x = (column << grid.tile_width_log2) + ((part & ((1 << cut.columns_log2) - 1)) << width_log2);
        return {grid.prefix + y * grid.width + x, grid.width, width_log2, clamp_to(grid.height - y, 1 << height_log2),
                clamp_to(grid.width - x, 1 << width_log2)};
    }
    const bool is_prefix = tile < 0;
    const int start = (is_prefix ? block : tile - grid.tile_blocks) * kBlockTokens + part * kPartTokens;
    const int offset = is_prefix ? 0 : grid.prefix + grid.height * grid.width;
    const int total = is_prefix ? grid.prefix : grid.suffix;
    return {offset + start, 0, kBlockTokensLog2 - kPartsLog2, 1, clamp_to(total - start, kPartTokens)};
}

}  // namespace sparse_attn
