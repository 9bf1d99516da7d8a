#include "launch_forward.cuh"

template cudaError_t sparse_attn::launch_forward<__nv_bfloat16, 96>(const ForwardParams&, bool, int, cudaStream_t);
