// Windows of an image, read and written in place. A window is a problem of its own, as an entry of the batch is; it
// differs in where it begins, and in that its neighbours must not be written into.
#pragma once

#include "../params.h"
#include "token_grid.cuh"

namespace sparse_attn {

// What is added to the coordinates of a block's patches.
struct Origin {
    int x, y, batch;
};

__device__ __forceinline__ int divide(int n, int divisor, uint32_t reciprocal) {
    return divisor == 1 ? n : int(__umulhi(n, reciprocal));
}

// `entry` is one of the batch, or a window.
template <bool kWindows>
__device__ __forceinline__ Origin origin_of(const ForwardParams& params, int entry) {
    const WindowParams& windows = params.windows;
    if (!kWindows || windows.height == 0) return {0, 0, entry};
    const int batch = divide(entry, windows.per_image, windows.per_image_reciprocal);
    const int window = entry - batch * windows.per_image;
    const int row = divide(window, windows.columns, windows.columns_reciprocal);
    return {(window - row * windows.columns) * params.query_grid.width, row * params.query_grid.height, batch};
}

// A window may hang so far over the image that a whole block of queries lies outside.
template <bool kWindows>
__device__ __forceinline__ bool lies_outside(const ForwardParams& params, BlockCode block, int entry) {
    if (!kWindows || params.windows.height == 0) return false;
    const Origin origin = origin_of<kWindows>(params, entry);
    return origin.y + y_of(params.query_grid, block) >= params.windows.height ||
           origin.x + x_of(params.query_grid, block) >= params.windows.width;
}

}  // namespace sparse_attn
