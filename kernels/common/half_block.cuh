// Half blocks: 64 of a block's 128 slots, which is the upper or lower half of a tile of patches, or half a run of tokens.
#pragma once

#include "softmax.cuh"
#include "tma.cuh"
#include "token_grid.cuh"

namespace sparse_attn {

constexpr int kHalfBlockTokens = kBlockTokens / 2;

// Coordinates of the first token of half a block in its part of the tensor.
__device__ __forceinline__ TileCoordinates half_block_at(const GridParams& grid, BlockCode block, int half, int head,
                                                         int batch) {
    TileCoordinates at{0, head, x_of(grid, block), y_of(grid, block), batch};
    if (part_of(block) == kImage && grid.tile_height > 1) {
        at.y += half << (grid.tile_height_log2 - 1);
    } else {
        at.x += half * kHalfBlockTokens;
    }
    return at;
}

// Number of a block in list order.
__device__ __forceinline__ int block_of_code(const GridParams& grid, BlockCode code) {
    const int column = code & (kMaxTileColumns - 1);
    if (part_of(code) == kPrefix) return column;
    if (part_of(code) == kSuffix) return grid.prefix_blocks + grid.tile_blocks + column;
    return grid.prefix_blocks + (code >> kCodeRowShift) * grid.tile_columns + column;
}

// Starts the copy of half a block from chunks of 64 columns; one thread calls it.
template <int kChunks>
__device__ __forceinline__ void store_half_block(const TensorMaps& maps, const GridParams& grid, BlockCode block, int half,
                                                 int head, int batch, const unsigned char* rows, int chunk_bytes) {
    TileCoordinates at = half_block_at(grid, block, half, head, batch);
    with_map(maps, block, [&](const CUtensorMap* map) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; chunk++) {
            at.column = 64 * chunk;
            tma_store(map, rows + chunk * chunk_bytes, at);
        }
    });
    tma_store_commit();
}

// Writes a warpgroup's 64 x kHeadDim accumulators, times `factor`, into a 128-byte-swizzled tile of 64 rows. Rows that are
// not `kept` become zero, whatever they hold.
template <typename T, int kHeadDim>
__device__ __forceinline__ void stage_half_block(unsigned char* tile, const float (&values)[kHeadDim / 2], float factor,
                                                 const bool (&kept)[2]) {
    static_assert(kHeadDim % 16 == 0, "stmatrix.x4 writes 16 columns");
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t line = shared_address(tile) + row * 128;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; i += 2) {
        const int column_group = i % 8 + lane / 16;
        const uint32_t address = line + (i / 8) * (kHalfBlockTokens * 128) + ((column_group ^ (row % 8)) << 4);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            pairs[j] = pack<T>(values[4 * i + 2 * j] * factor, values[4 * i + 2 * j + 1] * factor);
            if (!kept[j % 2]) pairs[j] = 0;
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(pairs[0]),
                     "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                     : "memory");
    }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void stage_half_block(unsigned char* tile, const float (&values)[kHeadDim / 2], float factor) {
    const bool kept[2] = {true, true};
    stage_half_block<T, kHeadDim>(tile, values, factor, kept);
}

}  // namespace sparse_attn
