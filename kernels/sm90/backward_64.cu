#include "launch_backward.cuh"

namespace sparse_attn {

template cudaError_t launch_backward_query<__nv_bfloat16, 64>(const BackwardParams&, bool, int, cudaStream_t);
template cudaError_t launch_backward_key<__nv_bfloat16, 64>(const BackwardParams&, bool, int, cudaStream_t);
template cudaError_t launch_backward_fused<__nv_bfloat16, 64>(const BackwardParams&, bool, int, cudaStream_t);
template cudaError_t launch_backward_query<__half, 64>(const BackwardParams&, bool, int, cudaStream_t);
template cudaError_t launch_backward_key<__half, 64>(const BackwardParams&, bool, int, cudaStream_t);
template cudaError_t launch_backward_fused<__half, 64>(const BackwardParams&, bool, int, cudaStream_t);

}  // namespace sparse_attn
