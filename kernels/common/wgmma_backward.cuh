// Matrix products of the backward pass that the forward pass has no use for. See wgmma.cuh for what a thread holds.
#pragma once

#include "wgmma.cuh"

namespace sparse_attn {

// Operands in registers must be complete before the fence, or the compiler adds fences of its own.
template <int kSteps>
__device__ __forceinline__ void pin_operands(uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// A first product that only writes its accumulator: nothing has to be set to zero, and no register is held before it.
#define NEW_FLOATS_8(d, i) \
    "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), "=f"(d[i + 6]), "=f"(d[i + 7])
#define NEW_FLOATS_12(d, i) NEW_FLOATS_8(d, i), "=f"(d[i + 8]), "=f"(d[i + 9]), "=f"(d[i + 10]), "=f"(d[i + 11])
#define NEW_FLOATS_16(d, i) NEW_FLOATS_8(d, i), NEW_FLOATS_8(d, i + 8)
#define NEW_FLOATS_20(d, i) NEW_FLOATS_8(d, i), NEW_FLOATS_12(d, i + 8)
#define NEW_FLOATS_24(d, i) NEW_FLOATS_16(d, i), NEW_FLOATS_8(d, i + 16)
#define NEW_FLOATS_32(d, i) NEW_FLOATS_16(d, i), NEW_FLOATS_16(d, i + 16)
#define NEW_FLOATS_44(d, i) NEW_FLOATS_32(d, i), NEW_FLOATS_12(d, i + 32)
#define NEW_FLOATS_64(d, i) NEW_FLOATS_32(d, i), NEW_FLOATS_32(d, i + 32)

#define WGMMA_SHARED(type, columns, count, floats, accumulate, transpose_a, transpose_b, a_slot, b_slot) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" ACCUMULATORS_##count "}, " \
                 a_slot ", " b_slot ", " #accumulate ", 1, 1, " #transpose_a ", " #transpose_b ";" \
                 : floats##_##count(d, 0) : "l"(a), "l"(b))
#define WGMMA_SHARED_OF_TYPE(columns, count, transpose_a, transpose_b, ...) \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) { \
        if constexpr (kAccumulate) { \
            WGMMA_SHARED("bf16", columns, count, FLOATS, 1, transpose_a, transpose_b, __VA_ARGS__); \
        } else { \
            WGMMA_SHARED("bf16", columns, count, NEW_FLOATS, 0, transpose_a, transpose_b, __VA_ARGS__); \
        } \
    } else { \
        if constexpr (kAccumulate) { \
            WGMMA_SHARED("f16", columns, count, FLOATS, 1, transpose_a, transpose_b, __VA_ARGS__); \
        } else { \
            WGMMA_SHARED("f16", columns, count, NEW_FLOATS, 0, transpose_a, transpose_b, __VA_ARGS__); \
        } \
    }

// Accumulator (+)= A B^T, both from shared memory with their depth along the rows: K Q^T and V dO^T.
template <typename T, int kColumns, bool kAccumulate>
__device__ __forceinline__ void wgmma_scores(float (&d)[kColumns / 2], uint64_t a, uint64_t b) {
    if constexpr (kColumns == 64) {
        WGMMA_SHARED_OF_TYPE(64, 32, 0, 0, "%32", "%33");
    } else if constexpr (kColumns == 128) {
        WGMMA_SHARED_OF_TYPE(128, 64, 0, 0, "%64", "%65");
    } else {
        static_assert(kColumns == 64, "write the instruction for this number of columns above");
    }
}

// Scores = A B^T of 64 rows of A and 2 kPairs rows of B, whose chunks of 64 columns lie as far apart as said.
template <typename T, int kHeadDim, int kPairs>
__device__ __forceinline__ void issue_scores(float (&scores)[kPairs], int a_tile, int a_chunk_bytes, int b_tile,
                                             int b_chunk_bytes) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; step++) {
        const int along = step % 4 * kDepthStepAlongRows;
        const uint64_t a = tile_descriptor(a_tile + step / 4 * (a_chunk_bytes >> 4) + along);
        const uint64_t b = tile_descriptor(b_tile + step / 4 * (b_chunk_bytes >> 4) + along);
        if (step == 0) {
            wgmma_scores<T, 2 * kPairs, false>(scores, a, b);
        } else {
            wgmma_scores<T, 2 * kPairs, true>(scores, a, b);
        }
    }
    wgmma_commit();
}

// This thread's two of 64 rows of one tile, each times the same row of another: the diagonal of A B^T.
template <typename T, int kHeadDim>
__device__ __forceinline__ void product_of_rows(float (&products)[2], int a_tile, int b_tile, int chunk_bytes) {
    float square[32];
    wgmma_fence();
    issue_scores<T, kHeadDim>(square, a_tile, chunk_bytes, b_tile, chunk_bytes);
    wgmma_wait<0>(square);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = lane / 4;  // of 8
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float product = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int at = 8 * j + 6 * i;
            if (warp == j) product = row % 2 ? square[at + 1] : square[at];
        }
        products[i] = __shfl_sync(0xffffffff, product, lane / 4 * 4 + row / 2);
    }
}

// Accumulator (+)= A B, both from shared memory, B with its depth down the rows: dS K.
template <typename T, int kColumns, bool kAccumulate>
__device__ __forceinline__ void wgmma_shared_output(float (&d)[kColumns / 2], uint64_t a, uint64_t b) {
#define WGMMA_SHARED_OUTPUT(columns, count, ...) WGMMA_SHARED_OF_TYPE(columns, count, 0, 1, __VA_ARGS__)
    if constexpr (kColumns == 24) {
        WGMMA_SHARED_OUTPUT(24, 12, "%12", "%13");
    } else if constexpr (kColumns == 32) {
        WGMMA_SHARED_OUTPUT(32, 16, "%16", "%17");
    } else if constexpr (kColumns == 40) {
        WGMMA_SHARED_OUTPUT(40, 20, "%20", "%21");
    } else if constexpr (kColumns == 48) {
        WGMMA_SHARED_OUTPUT(48, 24, "%24", "%25");
    } else if constexpr (kColumns == 64) {
        WGMMA_SHARED_OUTPUT(64, 32, "%32", "%33");
    } else if constexpr (kColumns == 88) {
        WGMMA_SHARED_OUTPUT(88, 44, "%44", "%45");
    } else {
        static_assert(kColumns == 32, "write the instruction for this number of columns above");
    }
#undef WGMMA_SHARED_OUTPUT
}

#undef WGMMA_SHARED_OF_TYPE
#undef WGMMA_SHARED

}  // namespace sparse_attn
