// What the fused backward kernel's thread blocks compute one after the other: blocks of keys of a head.
#pragma once

#include "../common/mbarrier.cuh"
#include "../params.h"

namespace sparse_attn {

// Heads follow each other, so that their queries stay in the cache.
struct FusedWork {
    static constexpr int kNone = 0x7fffffff;
    int key_block, head, batch;

    __device__ __forceinline__ FusedWork(const BackwardParams& params, int index) {
        const int heads = params.query_heads / params.heads_per_key_head, any_head = index / params.key_grid.num_blocks;
        key_block = index - any_head * params.key_grid.num_blocks;
        batch = any_head / heads;
        head = any_head - batch * heads;
    }

    static __host__ __device__ __forceinline__ int count(const BackwardParams& params) {
        return params.key_grid.num_blocks * (params.query_heads / params.heads_per_key_head) * params.batch;
    }

    // They are handed out as thread blocks get to them: how many queries attend to them differs. Called by a whole warp.
    static __device__ __forceinline__ int take(const BackwardParams& params) {
        int taken = 0;
        if (threadIdx.x % 32 == 0) taken = atomicAdd(params.blocks_taken, 1);
        return warp_uniform(taken) + gridDim.x;
    }
};

}  // namespace sparse_attn
