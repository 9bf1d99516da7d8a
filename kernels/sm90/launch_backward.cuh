// Chooses the variants of the backward pass's kernels, and launches them.
#pragma once

#include "backward_fused.cuh"
#include "backward_helpers.cuh"
#include "backward_key.cuh"
#include "backward_query.cuh"
#include "launch.h"
#include "launch_device.cuh"

namespace sparse_attn {

template <typename Kernel>
cudaError_t launch_backward(void (*kernel)(BackwardParams), dim3 blocks, const BackwardParams& params, int device,
                            cudaStream_t stream, std::atomic<uint64_t>& allowed) {
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    constexpr size_t kBytes = sizeof(typename Kernel::Storage);
    const cudaError_t error = allow_shared_memory(kernel, kBytes, device, allowed);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, Kernel::kThreads, kBytes, stream>>>(params);
    return cudaGetLastError();
}

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
cudaError_t launch_query_variant(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const dim3 blocks(params.query_grid.num_blocks, params.query_heads, params.batch);
    return launch_backward<QueryBackward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>>(
        backward_query<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>, blocks, params, device, stream, allowed);
}

template <typename T, int kHeadDim, bool kRelativePosition>
cudaError_t launch_query(const BackwardParams& params, int device, cudaStream_t stream) {
    if (params.dropout.seed) return launch_query_variant<T, kHeadDim, kRelativePosition, true, true>(params, device, stream);
    return params.mask_keys ? launch_query_variant<T, kHeadDim, kRelativePosition, true, false>(params, device, stream)
                            : launch_query_variant<T, kHeadDim, kRelativePosition, false, false>(params, device, stream);
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_query(const BackwardParams& params, bool relative_position, int device, cudaStream_t stream) {
    return relative_position ? launch_query<T, kHeadDim, true>(params, device, stream)
                             : launch_query<T, kHeadDim, false>(params, device, stream);
}

template <typename T, int kHeadDim, bool kRelativePosition, bool kDropout>
cudaError_t launch_key_variant(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const dim3 blocks(2 * params.key_grid.num_blocks, params.query_heads / params.heads_per_key_head, params.batch);
    return launch_backward<KeyBackward<T, kHeadDim, kRelativePosition, kDropout>>(
        backward_key<T, kHeadDim, kRelativePosition, kDropout>, blocks, params, device, stream, allowed);
}

template <typename T, int kHeadDim, bool kRelativePosition>
cudaError_t launch_key(const BackwardParams& params, int device, cudaStream_t stream) {
    return params.dropout.seed ? launch_key_variant<T, kHeadDim, kRelativePosition, true>(params, device, stream)
                               : launch_key_variant<T, kHeadDim, kRelativePosition, false>(params, device, stream);
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_key(const BackwardParams& params, bool relative_position, int device, cudaStream_t stream) {
    return relative_position ? launch_key<T, kHeadDim, true>(params, device, stream)
                             : launch_key<T, kHeadDim, false>(params, device, stream);
}

template <typename T, int kHeadDim, bool kRelativePosition>
cudaError_t launch_fused_variant(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    using Fused = FusedBackward<T, kHeadDim, kRelativePosition>;
    const int blocks = int(std::min<int64_t>(FusedWork::count(params), multiprocessors(device)));
    return launch_backward<Fused>(backward_fused<T, kHeadDim, kRelativePosition>, blocks, params, device, stream, allowed);
}

template <typename T, int kHeadDim>
cudaError_t launch_fused(const BackwardParams& params, bool relative_position, int device, cudaStream_t stream) {
    if (!relative_position) return launch_fused_variant<T, kHeadDim, false>(params, device, stream);
    if constexpr (fuses_relative_position(kHeadDim)) {
        const cudaError_t error = launch_before_relative_position<T>(params, stream);
        return error == cudaSuccess ? launch_fused_variant<T, kHeadDim, true>(params, device, stream) : error;
    }
    return cudaErrorNotSupported;
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_fused(const BackwardParams& params, bool relative_position, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed_before{0}, allowed_after{0};
    const dim3 half_blocks(2 * params.query_grid.num_blocks, params.query_heads, params.batch);
    cudaError_t error = launch_backward<PrepareBackward<T, kHeadDim>>(prepare_backward<T, kHeadDim>, half_blocks, params,
                                                                      device, stream, allowed_before);
    if (error == cudaSuccess) error = launch_fused<T, kHeadDim>(params, relative_position, device, stream);
    if (error != cudaSuccess) return error;
    error = launch_backward<FinishQueryGradient<T, kHeadDim>>(finish_query_gradient<T, kHeadDim>, half_blocks, params, device,
                                                              stream, allowed_after);
    return error == cudaSuccess && relative_position ? launch_after_relative_position<T>(params, stream) : error;
}

}  // namespace sparse_attn
