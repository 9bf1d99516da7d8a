// Chooses the kernel's structure and variant, and launches it.
#pragma once

#include <algorithm>

#include "forward_paired.cuh"
#include "forward_persistent.cuh"
#include "launch.h"
#include "launch_device.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
cudaError_t launch_persistent(const ForwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    using Kernel = PersistentForward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>;
    const auto kernel = forward_persistent<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>;
    const cudaError_t error = allow_shared_memory(kernel, sizeof(typename Kernel::Storage), device, allowed);
    if (error != cudaSuccess) return error;
    const int64_t work = int64_t(params.query_grid.num_blocks) * params.query_heads * params.batch;
    const int blocks = int(std::min<int64_t>(work, multiprocessors(device)));
    kernel<<<blocks, Kernel::kThreads, sizeof(typename Kernel::Storage), stream>>>(params);
    return cudaGetLastError();
}

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys>
cudaError_t launch_variant(const ForwardParams& params, int device, cudaStream_t stream) {
    if constexpr (kHeadDim > 64) {
        return launch_persistent<T, kHeadDim, kRelativePosition, kMaskedKeys, false>(params, device, stream);
    } else {
        static std::atomic<uint64_t> allowed{0};
        if (device >= kMaxDevices) return cudaErrorInvalidDevice;
        using Kernel = PairedForward<T, kHeadDim, kRelativePosition, kMaskedKeys>;
        const auto kernel = forward_paired<T, kHeadDim, kRelativePosition, kMaskedKeys>;
        const cudaError_t error = allow_shared_memory(kernel, sizeof(typename Kernel::Storage), device, allowed);
        if (error != cudaSuccess) return error;
        const dim3 blocks(params.query_grid.num_blocks, params.query_heads, params.batch);
        kernel<<<blocks, Kernel::kThreads, sizeof(typename Kernel::Storage), stream>>>(params);
        return cudaGetLastError();
    }
}

template <typename T, int kHeadDim>
cudaError_t launch_forward(const ForwardParams& params, bool relative_position, int device, cudaStream_t stream) {
    if (params.dropout.seed != nullptr) {
        return relative_position ? launch_persistent<T, kHeadDim, true, true, true>(params, device, stream)
                                 : launch_persistent<T, kHeadDim, false, true, true>(params, device, stream);
    }
    if (relative_position) {
        return params.mask_keys ? launch_variant<T, kHeadDim, true, true>(params, device, stream)
                                : launch_variant<T, kHeadDim, true, false>(params, device, stream);
    }
    return params.mask_keys ? launch_variant<T, kHeadDim, false, true>(params, device, stream)
                            : launch_variant<T, kHeadDim, false, false>(params, device, stream);
}

}  // namespace sparse_attn
