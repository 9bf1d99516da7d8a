// What a kernel is told: geometry, tensor maps, index lists. Plain data, passed by value as the kernel's parameter.
#pragma once

#include <cuda.h>
#include <cstdint>

namespace sparse_attn {

constexpr int kBlockTokensLog2 = 7;
constexpr int kBlockTokens = 1 << kBlockTokensLog2;  // tokens of a full block: one tile of patches, or a run of extra tokens

// Tokens of one image in memory order: prefix, height x width patches in raster order, suffix.
// Blocks in list order: prefix blocks, tiles in raster order, suffix blocks.
struct GridParams {
    int prefix, height, width, suffix;  // in tokens
    int tile_height, tile_width;        // powers of two, product kBlockTokens
    int tile_height_log2, tile_width_log2;
    int prefix_blocks, tile_columns, tile_blocks, num_blocks;
    uint32_t tile_columns_reciprocal;   // ceil(2^32 / tile_columns), 0 for one column
};

// One tensor [batch, heads, tokens, head_dim] seen as three: its prefix, its patches, its suffix. Each is the 5-D array
// {head_dim, heads, x, y, batch}, so that copies stop at the edges of the grid and never cross into the next row of
// patches. Extra tokens lie along x. A map whose part has no tokens is all zero and never used.
struct TensorMaps {
    CUtensorMap prefix, image, suffix;
};

struct DropoutParams {
    const int64_t* seed;  // on the device; null: nothing is dropped
    uint32_t threshold;   // weights whose 24 random bits are below it are dropped
    float inverse_keep;   // what the others are multiplied by
};

// Attention within windows of an image: the windows of all images stand where the batch does otherwise, and the grids of
// queries and keys are that of one window, while tensors are those of whole images.
struct WindowParams {
    int height, width;       // of the image, in tokens; 0: there are no windows
    int columns, per_image;  // windows in a row of windows, and in an image
    uint32_t columns_reciprocal, per_image_reciprocal;  // ceil(2^32 / n), 0 for 1
    CUtensorMap out_row;     // box: 64 of head_dim x one row of a tile that has tiles to its right
};

struct ForwardParams {
    TensorMaps query, key, value;  // box: 64 of head_dim x one block
    TensorMaps out;           // box: 64 of head_dim x half a block, what one warpgroup writes; or, of windows, one row of
                              // a tile in the last column
    TensorMaps rel_h, rel_w;  // [B, Hq, Nq, Kh], [B, Hq, Nq, Kw]; box: one tile height (width) x one block of queries

    GridParams query_grid, key_grid;
    int batch, query_heads, heads_per_key_head;
    WindowParams windows;

    const int32_t* key_counts;   // [B | 1, Hq | 1, Q]; null: every key block is active, and the two below are null
    const int32_t* key_indices;  // [B | 1, Hq | 1, Q, K], active key blocks first
    const int32_t* row_order;    // [B | 1, Hq | 1, Q], query blocks in launch order; null: as numbered
    int list_batch_stride;       // in rows of Q entries: 0 where the lists are shared
    int list_head_stride;

    const uint8_t* key_padding;  // bool [B, Nk], true: the key does not exist; null: all exist
    float* lse;                  // [B, Hq, Nq], natural logarithm; null: not wanted

    float scale;       // of the logits
    float scale_log2;  // scale * log2(e): the exponentials are powers of two
    float inverse_scale;
    bool mask_keys;          // some key block has absent keys: ragged tiles, extra tokens, padding
    bool relative_position;  // rel_h and rel_w are there
    DropoutParams dropout;
};

struct BackwardParams {
    TensorMaps query, key, value, grad_out, out;  // loads; box: 64 of head_dim x half a block
    TensorMaps grad_query, grad_key, grad_value;  // stores, likewise
    TensorMaps rel_h, rel_w;                      // loads; box: one tile height (width) of keys x half a block of queries;
                                                  // rel_h for the fused kernel: 64 rows of keys

    GridParams query_grid, key_grid;
    int batch, query_heads, heads_per_key_head;

    const int32_t* key_counts;  // as in ForwardParams
    const int32_t* key_indices;
    const int32_t* row_order;
    int list_batch_stride;
    int list_head_stride;

    const int32_t* query_counts;   // [B | 1, Hq | 1, K]; null: every query block is active, and the one below is null
    const int32_t* query_indices;  // [B | 1, Hq | 1, K, Q], active query blocks first
    int query_list_batch_stride;   // in rows of K entries: 0 where the lists are shared
    int query_list_head_stride;

    const uint8_t* key_padding;  // bool [B, Nk], true: the key does not exist; null: all exist
    const float* lse;            // [B, Hq, Nq], natural logarithm; -inf: the query has no key
    const float* grad_lse;       // likewise, its gradient; null: not used
    float* statistics;           // [B, Hq, Q, 64, 4]: see common/statistics.cuh
    float* grad_query_sums;      // [B, Hq, Q, 2, D / 8, 128, 4]: see common/query_sums.cuh
    int* blocks_taken;           // of keys (halves, by the pair's kernel), beyond the first ones; the kernel before it makes
                                 // this and the next two zero
    int* key_blocks_added;       // [B, Hk]: blocks of keys whose part of all dQ has been added
    int* finished;               // [B, Hq, Q, 2]: whether the fused kernel itself has made gradients of the sums

    void* grad_rel_h;   // [B, Hq, Nq, Kh], contiguous, dtype of the inputs; null: no relative position
    void* grad_rel_w;   // [B, Hq, Nq, Kw], likewise
    float* rel_w_sums;  // [B, Hq, Q, columns of key tiles, 2048]: see common/relative_position_sums.cuh

    float scale;       // of the logits
    float scale_log2;  // scale * log2(e): the exponentials are powers of two
    float inverse_scale;
    bool mask_keys;          // some key block has absent keys: ragged tiles, extra tokens, padding
    bool relative_position;  // rel_h and rel_w are there
    DropoutParams dropout;

    // Of the fused kernel with a relative position: see common/fused_relative_position.cuh.
    float* rel_offsets;  // [B, Hq, Q, rows of key tiles (+ 1), 2, 8, 64]
    float* rel_sums;     // [B, Hq, Q, 2, rows + 2 columns of key tiles, 128, 4]
};

}  // namespace sparse_attn
