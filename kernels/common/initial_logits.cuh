// What the logits start from before Q K^T is accumulated onto them: the relative position's bias, and -inf for keys
// that do not exist. Starting there is cheaper than adding after, and leaves nothing between product and softmax.
#pragma once

#include "../params.h"
#include "softmax.cuh"
#include "token_grid.cuh"

namespace sparse_attn {

constexpr int kBiasTileHeight = 8, kBiasTileWidth = 16;  // the key tile the bias code is written for
static_assert(kBiasTileHeight * kBiasTileWidth == kBlockTokens, "a key tile is one block");

// Bias values of one key tile for a block of queries.
template <typename T>
struct RelativePositionTile {
    alignas(128) T rel_h[kBlockTokens * kBiasTileHeight];
    alignas(128) T rel_w[kBlockTokens * kBiasTileWidth];
};

// (rel_h + rel_w) / scale, for this thread's two query rows; -inf outside the part of the tile that exists, which costs
// next to nothing here because it is a rectangle too.
template <typename T, bool kRagged>
__device__ __forceinline__ void relative_position_bias(float (&logits)[64], const RelativePositionTile<T>& tile,
                                                       float inverse_scale, int valid_x, int valid_y) {
    const int row = query_row_of_thread(), column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = row + 8 * half;
        const uint4 h = *reinterpret_cast<const uint4*>(&tile.rel_h[query * kBiasTileHeight]);
        const uint32_t h_pairs[4] = {h.x, h.y, h.z, h.w};
        float2 w[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            w[i] = unpack<T>(*reinterpret_cast<const uint32_t*>(&tile.rel_w[query * kBiasTileWidth + 8 * i + column]));
            w[i].x *= inverse_scale;
            w[i].y *= inverse_scale;
            if (kRagged && 8 * i + column >= valid_x) w[i].x = -INFINITY;
            if (kRagged && 8 * i + column + 1 >= valid_x) w[i].y = -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 pair = unpack<T>(h_pairs[i / 4]);
            float of_row = (i / 2) % 2 ? pair.y : pair.x;
            if (kRagged && i / 2 >= valid_y) of_row = -INFINITY;
            logits[4 * i + 2 * half] = fmaf(of_row, inverse_scale, w[i % 2].x);
            logits[4 * i + 2 * half + 1] = fmaf(of_row, inverse_scale, w[i % 2].y);
        }
    }
}

// Bit c: whether the key of column c exists, for the columns of this thread; 32 columns per word. Column 0 is the key in
// slot `first_slot` of its block.
template <int kWords, typename Params>
__device__ __forceinline__ void existing_keys(uint32_t (&exists)[kWords], const Params& params, const BlockPlace& place,
                                              int batch, int first_slot = 0) {
    const GridParams& grid = params.key_grid;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWords; i++) {
        const int slot = first_slot + 32 * i + lane;
        bool present = place.exists(slot);
        if (present && params.key_padding != nullptr) {
            const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
            present = !params.key_padding[batch * tokens + place.token(slot)];
        }
        exists[i] = __ballot_sync(0xffffffff, present) >> (2 * (lane % 4));
    }
}

// Fills `logits` with what Q K^T is accumulated onto.
template <typename T, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
__device__ __forceinline__ void initial_logits(float (&logits)[64], const ForwardParams& params, BlockCode key_block,
                                               int batch, const RelativePositionTile<T>* bias) {
    // Found out before the logits are touched, while the register file has room for it.
    uint32_t exists[4];
    bool masked = false;
    const bool has_bias = kRelativePosition && part_of(key_block) == kImage && (!kDropout || params.relative_position);
    if constexpr (kMaskedKeys) {
        const BlockPlace place(params.key_grid, key_block);
        masked = params.key_padding != nullptr || (!has_bias && !place.is_full());
        if (masked) existing_keys(exists, params, place, batch);
    }
    if (has_bias) {
        if constexpr (kRelativePosition) {
            const int valid_x = params.key_grid.width - x_of(params.key_grid, key_block);
            const int valid_y = params.key_grid.height - y_of(params.key_grid, key_block);
            relative_position_bias<T, kMaskedKeys>(logits, *bias, params.inverse_scale, valid_x, valid_y);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 64; i++) logits[i] = 0.0f;
    }
    if (masked) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (!(exists[i / 4] >> (8 * (i % 4) + j % 2) & 1)) logits[4 * i + j] = -INFINITY;
            }
        }
    }
}

}  // namespace sparse_attn
