#include "backward_relative_position.cuh"

#include "launch.h"
#include "launch_device.cuh"

namespace sparse_attn {

template <typename T>
cudaError_t launch_before_relative_position(const BackwardParams& params, cudaStream_t stream) {
    using Kernel = PrepareRelativePosition<T>;
    const dim3 half_blocks(2 * params.query_grid.num_blocks, params.query_heads, params.batch);
    return launch_overlapping(prepare_relative_position<T>, half_blocks, Kernel::kThreads, sizeof(typename Kernel::Storage),
                              params, stream);
}

template <typename T>
cudaError_t launch_after_relative_position(const BackwardParams& params, cudaStream_t stream) {
    const dim3 half_blocks(2 * params.query_grid.num_blocks, params.query_heads, params.batch);
    return launch_overlapping(finish_relative_position<T>, half_blocks, FinishRelativePosition<T>::kThreads, 0, params, stream);
}

template cudaError_t launch_before_relative_position<__nv_bfloat16>(const BackwardParams&, cudaStream_t);
template cudaError_t launch_before_relative_position<__half>(const BackwardParams&, cudaStream_t);
template cudaError_t launch_after_relative_position<__nv_bfloat16>(const BackwardParams&, cudaStream_t);
template cudaError_t launch_after_relative_position<__half>(const BackwardParams&, cudaStream_t);

}  // namespace sparse_attn
