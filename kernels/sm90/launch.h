// What the operator calls: one function per dtype and native head_dim, each head_dim compiled in a file of its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../params.h"

namespace sparse_attn {

// Kernels with dropout take the longest to compile, and are the least used: heads of 32 and 80 run in those of 64 and 96.
constexpr bool compiled_with_dropout(int head_dim) { return head_dim != 32 && head_dim != 80; }

template <typename T, int kHeadDim>
cudaError_t launch_forward(const ForwardParams& params, int device, cudaStream_t stream);

// Statistics of the queries, their gradient and that of the relative position.
template <typename T, int kHeadDim>
cudaError_t launch_backward_query(const BackwardParams& params, int device, cudaStream_t stream);

// Gradients of keys and values, from those statistics.
template <typename T, int kHeadDim>
cudaError_t launch_backward_key(const BackwardParams& params, int device, cudaStream_t stream);

// The head_dims whose fused kernel serves a relative position; the pair serves it at all of them.
constexpr bool fuses_relative_position(int64_t head_dim) { return head_dim == 64 || head_dim == 80; }

// All gradients at once; not the same in every bit from run to run.
template <typename T, int kHeadDim>
cudaError_t launch_backward_fused(const BackwardParams& params, int device, cudaStream_t stream);

// What that launches for a relative position, whatever the head_dim, right before and some time after the fused kernel.
template <typename T>
cudaError_t launch_before_relative_position(const BackwardParams& params, cudaStream_t stream);
template <typename T>
cudaError_t launch_after_relative_position(const BackwardParams& params, cudaStream_t stream);

}  // namespace sparse_attn
