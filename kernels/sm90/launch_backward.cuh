// Chooses the variants of the backward pass's kernels, and launches them.
#pragma once

#include "backward_fused.cuh"
#include "backward_helpers.cuh"
#include "backward_key.cuh"
#include "backward_key_persistent.cuh"
#include "backward_query.cuh"
#include "backward_query_persistent.cuh"
#include "launch.h"
#include "launch_device.cuh"

namespace sparse_attn {

enum class Start { kAfterOthers, kOverlapping };  // of a kernel, with regard to the one before it in the stream

template <typename Kernel>
cudaError_t launch_backward(void (*kernel)(BackwardParams), dim3 blocks, const BackwardParams& params, int device,
                            cudaStream_t stream, std::atomic<uint64_t>& allowed, Start start) {
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    constexpr size_t kBytes = sizeof(typename Kernel::Storage);
    const cudaError_t error = allow_shared_memory(kernel, kBytes, device, allowed);
    if (error != cudaSuccess) return error;
    if (start == Start::kOverlapping) return launch_overlapping(kernel, blocks, Kernel::kThreads, kBytes, params, stream);
    kernel<<<blocks, Kernel::kThreads, kBytes, stream>>>(params);
    return cudaGetLastError();
}

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
cudaError_t launch_query_variant(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const dim3 blocks(params.query_grid.num_blocks, params.query_heads, params.batch);
    return launch_backward<QueryBackward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>>(
        backward_query<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>, blocks, params, device, stream, allowed,
        Start::kAfterOthers);
}

template <typename T, int kHeadDim, bool kMaskedKeys>
cudaError_t launch_query_persistent(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    using Kernel = PersistentQueryBackward<T, kHeadDim, kMaskedKeys>;
    return launch_backward<Kernel>(backward_query_persistent<T, kHeadDim, kMaskedKeys>,
                                   one_each(RowWork::count(params), device), params, device, stream, allowed,
                                   Start::kAfterOthers);
}

template <typename T, int kHeadDim, bool kRelativePosition>
cudaError_t launch_query(const BackwardParams& params, int device, cudaStream_t stream) {
    if constexpr (kHeadDim > 64 && !kRelativePosition) {
        return params.mask_keys ? launch_query_persistent<T, kHeadDim, true>(params, device, stream)
                                : launch_query_persistent<T, kHeadDim, false>(params, device, stream);
    } else {
        return params.mask_keys ? launch_query_variant<T, kHeadDim, kRelativePosition, true, false>(params, device, stream)
                                : launch_query_variant<T, kHeadDim, kRelativePosition, false, false>(params, device, stream);
    }
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_query(const BackwardParams& params, int device, cudaStream_t stream) {
    if constexpr (compiled_with_dropout(kHeadDim)) {
        if (params.dropout.seed != nullptr) return launch_query_variant<T, kHeadDim, true, true, true>(params, device, stream);
    } else if (params.dropout.seed != nullptr) {
        return cudaErrorInvalidValue;
    }
    return params.relative_position ? launch_query<T, kHeadDim, true>(params, device, stream)
                                    : launch_query<T, kHeadDim, false>(params, device, stream);
}

template <typename T, int kHeadDim, bool kDropout>
cudaError_t launch_key_variant(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const dim3 blocks(2 * params.key_grid.num_blocks, params.query_heads / params.heads_per_key_head, params.batch);
    return launch_backward<KeyBackward<T, kHeadDim, kDropout>>(backward_key<T, kHeadDim, kDropout>, blocks, params, device,
                                                               stream, allowed, Start::kOverlapping);
}

template <typename T, int kHeadDim>
cudaError_t launch_key_persistent(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    using Kernel = PersistentKeyBackward<T, kHeadDim>;
    return launch_backward<Kernel>(backward_key_persistent<T, kHeadDim>, one_each(Kernel::thread_blocks(params), device),
                                   params, device, stream, allowed, Start::kOverlapping);
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_key(const BackwardParams& params, int device, cudaStream_t stream) {
    if constexpr (compiled_with_dropout(kHeadDim)) {
        if (params.dropout.seed != nullptr) return launch_key_variant<T, kHeadDim, true>(params, device, stream);
    } else if (params.dropout.seed != nullptr) {
        return cudaErrorInvalidValue;
    }
    return params.relative_position ? launch_key_variant<T, kHeadDim, false>(params, device, stream)
                                    : launch_key_persistent<T, kHeadDim>(params, device, stream);
}

template <typename T, int kHeadDim, bool kRelativePosition>
cudaError_t launch_fused_variant(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    using Fused = FusedBackward<T, kHeadDim, kRelativePosition>;
    return launch_backward<Fused>(backward_fused<T, kHeadDim, kRelativePosition>, one_each(FusedWork::count(params), device),
                                  params, device, stream, allowed, Start::kOverlapping);
}

template <typename T, int kHeadDim>
cudaError_t launch_fused(const BackwardParams& params, int device, cudaStream_t stream) {
    if (!params.relative_position) return launch_fused_variant<T, kHeadDim, false>(params, device, stream);
    if constexpr (fuses_relative_position(kHeadDim)) {
        const cudaError_t error = launch_before_relative_position<T>(params, stream);
        return error == cudaSuccess ? launch_fused_variant<T, kHeadDim, true>(params, device, stream) : error;
    }
    return cudaErrorNotSupported;
}

template <typename T, int kHeadDim>
cudaError_t launch_backward_fused(const BackwardParams& params, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed_before{0}, allowed_after{0};
    const dim3 half_blocks(2 * params.query_grid.num_blocks, params.query_heads, params.batch);
    cudaError_t error = launch_backward<PrepareBackward<T, kHeadDim>>(prepare_backward<T, kHeadDim>, half_blocks, params,
                                                                      device, stream, allowed_before,
                                                                      Start::kAfterOthers);
    if (error == cudaSuccess) error = launch_fused<T, kHeadDim>(params, device, stream);
    if (error != cudaSuccess) return error;
    error = launch_backward<FinishQueryGradient<T, kHeadDim>>(finish_query_gradient<T, kHeadDim>, half_blocks, params, device,
                                                              stream, allowed_after, Start::kOverlapping);
    return error == cudaSuccess && params.relative_position ? launch_after_relative_position<T>(params, stream) : error;
}

}  // namespace sparse_attn
