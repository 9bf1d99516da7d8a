#include "launch_forward.cuh"

template cudaError_t sparse_attn::launch_forward<__nv_bfloat16, 128>(const ForwardParams&, bool, int, cudaStream_t);
