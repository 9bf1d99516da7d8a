// The blocks of queries that attend to a block of keys, over all query heads that share the key head, in order. A warp
// holds 32 entries, one per lane.
#pragma once

#include "../params.h"
#include "mbarrier.cuh"
#include "token_grid.cuh"

namespace sparse_attn {

class QueryList {
  public:
    int head;  // of the block of queries that was handed out last

    // How many blocks `next` will hand out.
    static __device__ __forceinline__ int length(const BackwardParams& params, int key_block, int key_head, int batch) {
        const int group = params.heads_per_key_head;
        if (params.query_counts == nullptr) return group * params.query_grid.num_blocks;
        int total = 0;
        for (int i = 0; i < group; i++) {
            total += __ldg(&params.query_counts[row(params, key_block, key_head * group + i, batch)]);
        }
        return warp_uniform(total);
    }

    // The calls below are by a whole warp.
    __device__ __forceinline__ void open(const BackwardParams& params, int key_block, int key_head, int batch) {
        key_block_ = key_block;
        batch_ = batch;
        head = key_head * params.heads_per_key_head;
        open_head(params);
    }

    // As `length`, of an opened list.
    __device__ __forceinline__ int total(const BackwardParams& params) const {
        if (params.heads_per_key_head == 1) return count_;
        return length(params, key_block_, head / params.heads_per_key_head, batch_);
    }

    // Not to be called more often than there are blocks.
    __device__ __forceinline__ BlockCode next(const BackwardParams& params) {
        while (position_ == count_) {
            head++;
            open_head(params);
        }
        if (position_ % 32 == 0 && position_ > 0) read(params);
        return warp_uniform(__shfl_sync(0xffffffff, window_, position_++ % 32));
    }

  private:
    static __device__ __forceinline__ int64_t row(const BackwardParams& params, int key_block, int head, int batch) {
        return int64_t(batch) * params.query_list_batch_stride + int64_t(head) * params.query_list_head_stride + key_block;
    }

    __device__ __forceinline__ void open_head(const BackwardParams& params) {
        position_ = 0;
        int count = params.query_grid.num_blocks;
        if (params.query_counts != nullptr) count = __ldg(&params.query_counts[row(params, key_block_, head, batch_)]);
        read(params);
        count_ = warp_uniform(count);
    }

    // Entries past the count exist and are not used; reading them spares waiting for the count.
    __device__ __forceinline__ void read(const BackwardParams& params) {
        const int length = params.query_grid.num_blocks;
        int block = position_ + threadIdx.x % 32;
        if (params.query_indices != nullptr) {
            const int64_t list = row(params, key_block_, head, batch_);
            block = block < length ? __ldg(&params.query_indices[list * length + block]) : 0;
        }
        window_ = code_of_block(params.query_grid, block);
    }

    int key_block_, batch_, position_, count_;
    BlockCode window_;
};

}  // namespace sparse_attn
