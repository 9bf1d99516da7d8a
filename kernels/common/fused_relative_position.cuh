// The relative position in the fused backward kernel: its bias, and the sums of dS over rows and columns of the key grid.
//
// Bias. The 16 keys of a warp are one row of their 8 x 16 tile, so that rel_h is part of the offset L of its exponents: a
// kernel before it writes L - rel_h log2(e) for each query and row of keys, row after row, as threads read it. rel_w is part
// of the product K Q^T: 16 more of its depth, with 1 / scale where a key has its column, in two parts since it may not be a
// number of the inputs' precision. Keys that are no patches take a row of the table that holds L alone, and a rel_w from
// outside the tensor, which arrives as zeros: there is no branch.
//
// Sums. They are 24 more columns of dQ = dS K: 8 rows and 16 columns of the tile, of a matrix of ones and zeros. They are
// added to a float32 workspace laid out as that of dQ (query_sums.cuh): half a block of queries has a group of 8 columns
// for each row of tiles, then two for each column of tiles.
#pragma once

#include "half_block.cuh"
#include "initial_logits.cuh"
#include "query_sums.cuh"
#include "statistics.cuh"

namespace sparse_attn {

constexpr int kPlaceColumns = kBiasTileHeight + kBiasTileWidth;

__host__ __device__ __forceinline__ int rows_of_tiles(const GridParams& keys) {
    return (keys.height + kBiasTileHeight - 1) / kBiasTileHeight;
}

// Rows of the table of offsets, of 8 rows of keys each; the last is that of keys that are no patches, if there are any.
__host__ __device__ __forceinline__ int rows_of_offsets(const GridParams& keys) {
    return rows_of_tiles(keys) + (keys.prefix + keys.suffix > 0);
}
// In each: for either half block of queries, 8 rows of 64 offsets, those of four queries together that a thread wants: of
// 16 queries, 2 m, 2 m + 1, 2 m + 8, 2 m + 9 for lanes m, m + 4, ...
constexpr int kOffsetsOfHalf = kBiasTileHeight * kHalfBlockTokens / 4;  // float4
__device__ __forceinline__ float4* offsets_of_half(const BackwardParams& params, int any_half_block, int row) {
    const int64_t any_row = int64_t(any_half_block / 2) * rows_of_offsets(params.key_grid) + row;
    return reinterpret_cast<float4*>(params.rel_offsets) + (2 * any_row + any_half_block % 2) * kOffsetsOfHalf;
}

// Groups of 8 columns of the sums of half a block of queries.
__host__ __device__ __forceinline__ int groups_of_places(const GridParams& keys) {
    return rows_of_tiles(keys) + keys.tile_columns * (kBiasTileWidth / 8);
}
__device__ __forceinline__ float4* place_sums_of_thread(const BackwardParams& params, int any_half_block) {
    return reinterpret_cast<float4*>(params.rel_sums) + int64_t(any_half_block) * groups_of_places(params.key_grid) * 128 +
           threadIdx.x % 128;
}

// Adds sums over the keys of a tile: one group of its rows, two of its columns.
__device__ __forceinline__ void add_to_place_sums(const BackwardParams& params, int any_half_block, BlockCode key_block,
                                                  const float (&values)[kPlaceColumns / 2]) {
    if (part_of(key_block) != kImage) return;
    const int row = key_block >> kCodeRowShift, column = key_block & (kMaxTileColumns - 1);
    float4* const sums = place_sums_of_thread(params, any_half_block);
    float4* const columns = sums + (rows_of_tiles(params.key_grid) + 2 * column) * 128;
    add_four(sums + row * 128, &values[0]);
    add_four(columns, &values[4]);
    add_four(columns + 128, &values[8]);
}

// The bias of one key block for the queries of a step.
template <typename T, int kQueries>
struct StepBias {
    static constexpr int kHalves = kQueries / kHalfBlockTokens;
    alignas(256) T rel_w[kQueries * kBiasTileWidth];  // in the 32-byte swizzle
    alignas(128) float4 offsets[kHalves * kOffsetsOfHalf];

    // Called by a whole warp. `half` is the step's first half block of queries, `shift` moves it along x.
    __device__ __forceinline__ void load(const BackwardParams& params, BlockCode query_block, int half, int any_half_block,
                                         int head, int batch, int shift, BlockCode key_block, uint64_t* full) {
        const GridParams& keys = params.key_grid;
        const bool has_bias = part_of(key_block) == kImage;
        with_map(params.rel_w, query_block, [&](const CUtensorMap* map) {
#pragma unroll
            for (int i = 0; i < kHalves; i++) {
                TileCoordinates at = half_block_at(params.query_grid, query_block, half + i, head, batch);
                at.x += shift;
                // A box must start at a multiple of 16 bytes, wherever it lies.
                at.column = (has_bias ? key_block & (kMaxTileColumns - 1) : keys.tile_columns) * kBiasTileWidth;
                tma_load(rel_w + i * kHalfBlockTokens * kBiasTileWidth, map, at, full);
            }
        });
        const int row = has_bias ? key_block >> kCodeRowShift : rows_of_tiles(keys);
        bulk_load(offsets, offsets_of_half(params, any_half_block, row), sizeof(offsets), full);
    }

    // This thread's offsets, of 16 queries.
    __device__ __forceinline__ float4 four_offsets(int step) const {
        return offsets[step / 4 * kOffsetsOfHalf + threadIdx.x / 32 * 16 + step % 4 * 4 + threadIdx.x % 4];
    }

    // What rel_w is multiplied by: 16 keys of a warp times their columns, with 1 / scale on the diagonal. First its rounded
    // value, then what rounding left of it. A thread's first and last word hold elements around the diagonal.
    static __device__ __forceinline__ void make_factors(uint32_t (&factors)[2][4], float inverse_scale) {
        const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
        const float of_first = row == column ? 1.0f : 0.0f, of_second = row == column + 1 ? 1.0f : 0.0f;
        const float rounded = float(T(inverse_scale));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float factor = i == 0 ? rounded : inverse_scale - rounded;
            factors[i][0] = factors[i][3] = pack<T>(of_first * factor, of_second * factor);
            factors[i][1] = factors[i][2] = 0;
        }
    }
};

// Of a tile in the 32-byte swizzle with its depth, 16, along the rows.
__device__ __forceinline__ uint64_t narrow_tile_descriptor(int low) {
    constexpr uint32_t kSwizzle32 = 3u << 30, kEightRows = 256 >> 4;
    return uint64_t(kSwizzle32 | kEightRows) << 32 | uint32_t(low);
}

// Ones where a key (depth) has its place in the tile: 24 columns. The 16 keys of a step of the product are one row, so that
// only the first 8 columns differ from step to step. Two steps lie side by side in 16 rows of 128 bytes.
template <typename T>
struct KeyPlaceTiles {
    static constexpr int kTileBytes = 16 * 128, kSecondBytes = 64;
    alignas(1024) unsigned char tiles[kBiasTileHeight / 2][kTileBytes];

    __device__ __forceinline__ void fill() {
        for (int i = threadIdx.x; i < kBiasTileHeight / 2 * 128; i += blockDim.x) {
            const int tile = i / 128, key = i / 8 % 16, group = i % 8;
            union {
                uint4 all;
                T columns[8];
            } ones;
#pragma unroll
            for (int column = 0; column < 8; column++) {
                const bool is_row = column == 2 * tile + group / 4, is_column = column + (group % 4 - 1) * 8 == key;
                ones.columns[column] = T((group % 4 == 0 ? is_row : is_column) ? 1.0f : 0.0f);
            }
            *reinterpret_cast<uint4*>(&tiles[tile][key * 128 + ((group ^ key % 8) << 4)]) = ones.all;
        }
    }

    // Of a step, from the first on, in units of 16 bytes.
    static constexpr __host__ __device__ int offset(int step) { return (step / 2 * kTileBytes + step % 2 * kSecondBytes) >> 4; }
};

}  // namespace sparse_attn
