// Chooses the kernel's structure and variant, and launches it.
#pragma once

#include "forward_paired.cuh"
#include "forward_persistent.cuh"
#include "launch.h"
#include "launch_device.cuh"

namespace sparse_attn {

template <typename Kernel>
cudaError_t launch_kernel(void (*kernel)(ForwardParams), const dim3& blocks, const ForwardParams& params, int device,
                          cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    const size_t bytes = sizeof(typename Kernel::Storage);
    const cudaError_t error = allow_shared_memory(kernel, bytes, device, allowed);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, Kernel::kThreads, bytes, stream>>>(params);
    return cudaGetLastError();
}

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
cudaError_t launch_persistent(const ForwardParams& params, int device, cudaStream_t stream) {
    const int64_t work = int64_t(params.query_grid.num_blocks) * params.query_heads * params.batch;
    return launch_kernel<PersistentForward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>>(
        forward_persistent<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>, one_each(work, device), params, device,
        stream);
}

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys>
cudaError_t launch_variant(const ForwardParams& params, int device, cudaStream_t stream) {
    if constexpr (kHeadDim <= 64) {
        const dim3 blocks(params.query_grid.num_blocks, params.query_heads, params.batch);
        return launch_kernel<PairedForward<T, kHeadDim, kRelativePosition, kMaskedKeys>>(
            forward_paired<T, kHeadDim, kRelativePosition, kMaskedKeys>, blocks, params, device, stream);
    } else {
        return launch_persistent<T, kHeadDim, kRelativePosition, kMaskedKeys, false>(params, device, stream);
    }
}

template <typename T, int kHeadDim>
cudaError_t launch_forward(const ForwardParams& params, int device, cudaStream_t stream) {
    if constexpr (compiled_with_dropout(kHeadDim)) {
        if (params.dropout.seed != nullptr) return launch_persistent<T, kHeadDim, true, true, true>(params, device, stream);
    } else if (params.dropout.seed != nullptr) {
        return cudaErrorInvalidValue;
    }
    if (params.relative_position) {
        return params.mask_keys ? launch_variant<T, kHeadDim, true, true>(params, device, stream)
                                : launch_variant<T, kHeadDim, true, false>(params, device, stream);
    }
    return params.mask_keys ? launch_variant<T, kHeadDim, false, true>(params, device, stream)
                            : launch_variant<T, kHeadDim, false, false>(params, device, stream);
}

}  // namespace sparse_attn
