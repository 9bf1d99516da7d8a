// The key blocks a block of queries attends to, in order, for both passes. A warp holds 32 entries, one per lane, and
// hands them out by shuffles, so that walking the list touches memory once in 32 blocks.
#pragma once

#include "../params.h"
#include "mbarrier.cuh"
#include "token_grid.cuh"

namespace sparse_attn {

struct QueryRow {
    int block;     // of queries
    int64_t list;  // row of the index lists
};

// Row of the index lists of a head's first query block.
template <typename Params>
__device__ __forceinline__ int64_t first_list(const Params& params, int head, int batch) {
    return int64_t(batch) * params.list_batch_stride + int64_t(head) * params.list_head_stride;
}

// The query block that is launched as number `rank` of its head.
template <typename Params>
__device__ __forceinline__ QueryRow query_row(const Params& params, int rank, int head, int batch) {
    if (params.key_counts == nullptr) return {rank, 0};
    const int64_t first = first_list(params, head, batch);
    const int block = params.row_order == nullptr ? rank : __ldg(&params.row_order[first + rank]);
    return {block, first + block};
}

// A block of queries, as a thread block that stays for many of them gets it. Heads follow each other, so that their keys
// and values stay in the cache. Every other one starts with its shortest rows: a thread block meets about the same ranks in
// each head, and so long and short rows balance.
struct RowWork {
    int rank, head, entry;  // of the batch, or the window

    template <typename Params>
    __device__ __forceinline__ RowWork(const Params& params, int index) {
        const int rows = params.query_grid.num_blocks, any_head = index / rows;
        rank = index - any_head * rows;
        if (any_head % 2) rank = rows - 1 - rank;
        entry = any_head / params.query_heads;
        head = any_head - entry * params.query_heads;
    }

    template <typename Params>
    static __host__ __device__ __forceinline__ int count(const Params& params) {
        return params.query_grid.num_blocks * params.query_heads * params.batch;
    }
};

class KeyList {
  public:
    // Called by whole warps. `list` is the row of the index lists.
    template <typename Params>
    __device__ __forceinline__ void open(const Params& params, int64_t list) {
        const int loaded = params.key_counts == nullptr ? params.key_grid.num_blocks : __ldg(&params.key_counts[list]);
        read(params, list, 0);
        count = warp_uniform(loaded);
    }

    // Finds the query block that is launched as number `rank`, and opens its list. Rows of equal length are launched as
    // they are numbered; so the list of block `rank` is asked for before it is known whether it is this one.
    // `meanwhile` is called while the entries are on their way.
    template <typename Params, typename Meanwhile>
    __device__ __forceinline__ QueryRow open_row(const Params& params, int rank, int head, int batch,
                                                 const Meanwhile& meanwhile) {
        if (params.key_counts == nullptr) {
            meanwhile();
            open(params, 0);
            return {rank, 0};
        }
        const int64_t first = first_list(params, head, batch);
        int block = params.row_order == nullptr ? rank : __ldg(&params.row_order[first + rank]);
        int loaded = __ldg(&params.key_counts[first + rank]);
        int entry = entry_of_lane(params, first + rank, 0);
        meanwhile();
        block = warp_uniform(block);
        if (block != rank) {
            loaded = __ldg(&params.key_counts[first + block]);
            entry = entry_of_lane(params, first + block, 0);
        }
        window_ = code_of_block(params.key_grid, entry);
        count = warp_uniform(loaded);
        return {block, first + block};
    }

    template <typename Params>
    __device__ __forceinline__ QueryRow open_row(const Params& params, int rank, int head, int batch) {
        return open_row(params, rank, head, batch, [] {});
    }

    // Called by whole warps, with `position` below count and growing by one from call to call.
    template <typename Params>
    __device__ __forceinline__ BlockCode next(const Params& params, const int64_t& list, unsigned position) {
        if (position % 32 == 0 && position > 0) read(params, list, position);
        return warp_uniform(__shfl_sync(0xffffffff, window_, position % 32));
    }

    int count;

  private:
    // Entries past `count` exist and are not used; reading them spares waiting for the count.
    template <typename Params>
    __device__ __forceinline__ void read(const Params& params, int64_t list, int first) {
        const int block = params.key_indices == nullptr ? first + threadIdx.x % 32 : entry_of_lane(params, list, first);
        window_ = code_of_block(params.key_grid, block);
    }

    template <typename Params>
    static __device__ __forceinline__ int entry_of_lane(const Params& params, int64_t list, int first) {
        const int length = params.key_grid.num_blocks, position = first + threadIdx.x % 32;
        return position < length ? __ldg(&params.key_indices[list * length + position]) : 0;
    }

    BlockCode window_;
};

}  // namespace sparse_attn
