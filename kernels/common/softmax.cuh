// Softmax over keys that arrive block by block: running maximum and sum of the two query rows a thread shares with the
// other three lanes of its quad. Statistics are float32; a row that has seen no key keeps sum 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace sparse_attn {

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
    } else {
        return __half22float2(reinterpret_cast<const __half2&>(pair));
    }
}

__device__ __forceinline__ float quad_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// How weights are added up: in a tree, which has no chain of additions to wait for; in a chain, which keeps fewer weights
// in registers; or not here, because the product with the values does it.
enum class Sums { kTree, kChain, kElsewhere };

struct OnlineSoftmax {
    static constexpr float kNoOffset = 3e38f;   // no key so far: makes weights of anything finite zero
    float offset[2] = {kNoOffset, kNoOffset};  // maximum, scaled; what the exponents subtract
    float sum[2] = {0.0f, 0.0f};               // of this thread's columns alone

    // Takes in a block's logits. What was accumulated so far must be multiplied by `rescale`.
    __device__ __forceinline__ void raise_maximum(const float (&logits)[64], float scale_log2, float (&rescale)[2]) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float highest = fmaxf(logits[2 * row], logits[2 * row + 1]);
#pragma unroll
            for (int i = 1; i < 16; i++) {
                highest = fmaxf(highest, fmaxf(logits[4 * i + 2 * row], logits[4 * i + 2 * row + 1]));
            }
            highest = quad_maximum(highest) * scale_log2;
            const float before = has_keys(row) ? offset[row] : -INFINITY;
            const float raised = fmaxf(before, highest);
            // With every key so far masked, -inf - -inf would be NaN.
            offset[row] = raised == -INFINITY ? kNoOffset : raised;
            rescale[row] = exp2_approximate(before - offset[row]);
            sum[row] *= rescale[row];
        }
    }

    // Whether the row has had a key that exists.
    __device__ __forceinline__ bool has_keys(int row) const { return offset[row] != kNoOffset; }

    // The logits of the 16 keys of a step become weights.
    template <Sums kSums = Sums::kChain>
    __device__ __forceinline__ void exponentiate(float (&logits)[64], float scale_log2, int step) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float& x = logits[8 * step + i];
            x = exp2_approximate(fmaf(x, scale_log2, -offset[i / 2 % 2]));
        }
        if constexpr (kSums != Sums::kElsewhere) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const float* x = &logits[8 * step + 2 * row];
                sum[row] = kSums == Sums::kTree ? sum[row] + ((x[0] + x[1]) + (x[4] + x[5]))
                                                : sum[row] + x[0] + x[1] + x[4] + x[5];
            }
        }
    }

    // From here on `sum` holds what all four lanes saw.
    __device__ __forceinline__ void add_up_quad() {
#pragma unroll
        for (int row = 0; row < 2; row++) sum[row] = quad_sum(sum[row]);
    }

    // After `sum` is whole.
    __device__ __forceinline__ void finish(float (&inverse)[2], float (&log_sum)[2]) const {
        constexpr float kLn2 = 0.693147181f;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            inverse[row] = sum[row] > 0.0f ? reciprocal_approximate(sum[row]) : 0.0f;
            log_sum[row] = sum[row] > 0.0f ? offset[row] * kLn2 + __logf(sum[row]) : -INFINITY;
        }
    }
};

// The weights of 16 keys, as operand A of the product with the values.
template <typename T>
__device__ __forceinline__ void pack_weights(const float (&weights)[64], int step, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack<T>(weights[8 * step + 2 * i], weights[8 * step + 2 * i + 1]);
}

template <int kCount>
__device__ __forceinline__ void rescale_rows(float (&out)[kCount], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] *= factor[(i / 2) % 2];
}

}  // namespace sparse_attn
