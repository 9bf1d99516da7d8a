// The key blocks a block of queries attends to, in order. A warp holds 32 entries, one per lane, and hands them out by
// shuffles, so that walking the list touches memory once in 32 blocks.
#pragma once

#include "../params.h"

namespace sparse_attn {

struct QueryRow {
    int block;        // of queries
    int64_t list;     // row of the index lists
};

// The query block that is launched as number `rank` of its head.
__device__ __forceinline__ QueryRow query_row(const ForwardParams& params, int rank, int head, int batch) {
    if (params.key_counts == nullptr) return {rank, 0};
    const int64_t first = int64_t(batch) * params.list_batch_stride + int64_t(head) * params.list_head_stride;
    const int block = params.row_order == nullptr ? rank : __ldg(&params.row_order[first + rank]);
    return {block, first + block};
}

class KeyList {
  public:
    // Called by whole warps. `list` is the row of the index lists.
    __device__ __forceinline__ void open(const ForwardParams& params, int64_t list) {
        if (params.key_indices == nullptr) {
            count = params.key_grid.num_blocks;
        } else {
            count = __ldg(&params.key_counts[list]);
            read(params, list, 0);
        }
    }

    // Called by whole warps, with `position` growing by one from call to call.
    __device__ __forceinline__ int next(const ForwardParams& params, const int64_t& list, int position) {
        if (params.key_indices == nullptr) return position;
        if (position % 32 == 0 && position > 0 && position < count) read(params, list, position);
        return __shfl_sync(0xffffffff, window_, position % 32);
    }

    int count;

  private:
    // Entries past `count` exist and are not used; reading them spares waiting for the count.
    __device__ __forceinline__ void read(const ForwardParams& params, int64_t list, int first) {
        const int position = first + threadIdx.x % 32, length = params.key_grid.num_blocks;
        window_ = position < length ? __ldg(&params.key_indices[list * length + position]) : 0;
    }

    int window_ = 0;
};

}  // namespace sparse_attn
