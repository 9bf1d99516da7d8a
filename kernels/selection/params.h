// What the kernels that choose blocks are told, and into which parts a block is cut.
#pragma once

#include "../params.h"

namespace sparse_attn {

// A block is cut into parts for selection: compact pieces of a tile, runs of extra tokens.
constexpr int kPartsLog2 = 2;
constexpr int kParts = 1 << kPartsLog2;
constexpr int kPartTokens = kBlockTokens / kParts;
constexpr int kExtraFeatures = 8;  // two, and zeros that fill up the matrix product's step

// Parts along the height and the width of a tile; their product is kParts.
struct CutParams {
    int rows_log2, columns_log2;
};

struct PoolTensor {
    const void* data;                                 // [B, H, N, head_dim], 16-byte aligned rows
    int64_t batch_stride, head_stride, token_stride;  // in elements
    float* features;                                  // [B, H, blocks * kParts, head_dim + kExtraFeatures], contiguous
    GridParams grid;
    CutParams cut;
    unsigned heads;
    unsigned parts;  // of all batch entries and heads
};

struct PoolParams {
    PoolTensor query, key;
    int head_dim;
    unsigned query_teams;  // those of the queries, filled up to whole thread blocks; the launch sets it
    float scale;
};

struct ChooseParams {
    const float* queries;  // [B, Hq, Q * kParts, features], contiguous
    const float* keys;     // [B, Hkv, K * kParts, features], contiguous
    uint8_t* blocks;       // [B, Hq, Q, K]
    int32_t* key_counts;   // [B, Hq, Q]
    int32_t* key_indices;  // [B, Hq, Q, K]
    int32_t* row_order;    // [B, Hq, Q]
    GridParams query_grid, key_grid;
    CutParams query_cut;
    int heads, heads_per_key_head;
    int features;          // a multiple of 8
    int count;             // of key blocks of a query tile; 0: as many as draw `mass`
    float mass;
    bool same_grids;
};

}  // namespace sparse_attn
