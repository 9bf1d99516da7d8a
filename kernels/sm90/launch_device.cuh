// What a launch asks of the device and tells it, once.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace sparse_attn {

constexpr int kMaxDevices = 64;

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t bytes, int device, std::atomic<uint64_t>& allowed) {
    const uint64_t bit = uint64_t(1) << device;
    if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
    return error;
}

// Launches a kernel that may begin before the last thread blocks of the one before it in the stream have ended, and waits
// for them by itself: see common/overlapping_launch.cuh.
template <typename Params>
cudaError_t launch_overlapping(void (*kernel)(Params), const dim3& blocks, int threads, size_t shared_bytes,
                               const Params& params, cudaStream_t stream) {
    cudaLaunchAttribute overlapping{};
    overlapping.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlapping.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlapping;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
}

inline int multiprocessors(int device) {
    static std::atomic<int> counts[kMaxDevices];
    int count = counts[device].load(std::memory_order_relaxed);
    if (count == 0 && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) {
        counts[device].store(count, std::memory_order_relaxed);
    }
    return count;
}

// One thread block per multiprocessor, unless there is less work.
inline dim3 one_each(int64_t work, int device) {
    const int64_t most = multiprocessors(device);
    return dim3(unsigned(work < most ? work : most));
}

}  // namespace sparse_attn
