#include "launch_forward.cuh"

namespace sparse_attn {

template cudaError_t launch_forward<__nv_bfloat16, 64>(const ForwardParams&, int, cudaStream_t);
template cudaError_t launch_forward<__half, 64>(const ForwardParams&, int, cudaStream_t);

}  // namespace sparse_attn
