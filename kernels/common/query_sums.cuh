// The float32 workspace in which the gradients of queries are summed, in the order in which a warpgroup holds the
// accumulators of half a block: 128 threads' four values of column group 0, then of group 1, and so on. A warp's reduction
// is 512 contiguous bytes.
#pragma once

#include "../params.h"

namespace sparse_attn {

// Of this thread's first four values of a half block.
template <int kHeadDim>
__device__ __forceinline__ float4* query_sums_of_thread(float* sums, int any_half_block) {
    return reinterpret_cast<float4*>(sums) + int64_t(any_half_block) * (kHeadDim / 8 * 128) + threadIdx.x % 128;
}

__device__ __forceinline__ void add_four(const float4* to, const float* values) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values[0]), "f"(values[1]),
                 "f"(values[2]), "f"(values[3])
                 : "memory");
}

// Adds groups of columns, from `first_group` on.
template <int kHeadDim, int kCount>
__device__ __forceinline__ void add_to_query_sums(float* sums, int any_half_block, int first_group,
                                                  const float (&values)[kCount]) {
    const float4* to = query_sums_of_thread<kHeadDim>(sums, any_half_block) + first_group * 128;
#pragma unroll
    for (int i = 0; i < kCount / 4; i++) add_four(to + i * 128, &values[4 * i]);
}

}  // namespace sparse_attn
