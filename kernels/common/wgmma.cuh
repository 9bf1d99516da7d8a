// Hopper's warpgroup matrix instructions: 64 rows of A times N columns of B, 16 deep, accumulated in registers.
// An accumulator d of a thread holds, for lane l of warp w, rows 16 w + l / 4 (d[4 i], d[4 i + 1]) and 8 below
// (d[4 i + 2], d[4 i + 3]) at columns 8 i + 2 (l % 4) and the next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>

#include "mbarrier.cuh"

namespace sparse_attn {

// Descriptors of 128-byte-swizzled tiles: rows of 128 bytes, groups of 8 rows 1024 bytes apart. Their low word, with the
// address in units of 16 bytes, is made once per tile as a warp-uniform value, to which callers add constant steps.

// Depth runs along the rows of the tile (Q and K): 16 deep are 32 bytes.
constexpr int kDepthStepAlongRows = 32 >> 4;
__device__ __forceinline__ int tile_along_rows(const void* tile) {
    return warp_uniform(int(shared_address(tile) >> 4 | 1 << 16));
}

// Depth runs down the rows (V): 16 deep are 2048 bytes. Tiles of 64 columns lie chunk_bytes apart.
constexpr int kDepthStepDownRows = 2048 >> 4;
__device__ __forceinline__ int tile_down_rows(const void* tile, int chunk_bytes) {
    return warp_uniform(int(shared_address(tile) >> 4 | uint32_t(chunk_bytes >> 4) << 16));
}

__device__ __forceinline__ uint64_t tile_descriptor(int low) {
    constexpr uint32_t kSwizzle128 = 1u << 30, kEightRows = 1024 >> 4;
    return uint64_t(kSwizzle128 | kEightRows) << 32 | uint32_t(low);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving uses of accumulators across the asynchronous instructions that own them.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(values[i])::"memory");
}

template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&accumulator)[kCount]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    pin_registers(accumulator);
}

#define FLOATS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_12(d, i) FLOATS_8(d, i), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11])
#define FLOATS_16(d, i) FLOATS_8(d, i), FLOATS_8(d, i + 8)
#define FLOATS_20(d, i) FLOATS_8(d, i), FLOATS_12(d, i + 8)
#define FLOATS_24(d, i) FLOATS_16(d, i), FLOATS_8(d, i + 16)
#define FLOATS_32(d, i) FLOATS_16(d, i), FLOATS_16(d, i + 16)
#define FLOATS_36(d, i) FLOATS_32(d, i), "+f"(d[i + 32]), "+f"(d[i + 33]), "+f"(d[i + 34]), "+f"(d[i + 35])
#define FLOATS_40(d, i) FLOATS_32(d, i), FLOATS_8(d, i + 32)
#define FLOATS_44(d, i) FLOATS_32(d, i), FLOATS_12(d, i + 32)
#define FLOATS_48(d, i) FLOATS_32(d, i), FLOATS_16(d, i + 32)
#define FLOATS_64(d, i) FLOATS_32(d, i), FLOATS_32(d, i + 32)

#define ACCUMULATORS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ACCUMULATORS_12 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
#define ACCUMULATORS_16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ACCUMULATORS_20 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define ACCUMULATORS_24 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define ACCUMULATORS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define ACCUMULATORS_36 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35"
#define ACCUMULATORS_40 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define ACCUMULATORS_44 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43"
#define ACCUMULATORS_48 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47"
#define ACCUMULATORS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Accumulator (+)= A B^T, both from shared memory: the logits of 128 keys.
template <typename T, bool kAccumulate>
__device__ __forceinline__ void wgmma_logits(float (&d)[64], uint64_t a, uint64_t b) {
#define WGMMA_LOGITS(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" ACCUMULATORS_64 "}, %64, %65, %66, 1, 1, 0, 0;" \
                 : FLOATS_64(d, 0) : "l"(a), "l"(b), "n"(int(kAccumulate)))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        WGMMA_LOGITS("bf16");
    } else {
        WGMMA_LOGITS("f16");
    }
#undef WGMMA_LOGITS
}

// Accumulator += A B, A from registers and B from shared memory with its depth down the rows: weights times values. Or along
// the rows: A B^T.
template <typename T, int kColumns, bool kDepthDownRows = true>
__device__ __forceinline__ void wgmma_output(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b) {
#define WGMMA_OUTPUT(type, columns, count, a0, a1, a2, a3, descriptor, transpose_b) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" ACCUMULATORS_##count "}, " \
                 "{" a0 ", " a1 ", " a2 ", " a3 "}, " descriptor ", 1, 1, 1, " transpose_b ";" \
                 : FLOATS_##count(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kDepthDownRows)))
#define WGMMA_OUTPUT_OF_TYPE(columns, count, ...) \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) { \
        WGMMA_OUTPUT("bf16", columns, count, __VA_ARGS__); \
    } else { \
        WGMMA_OUTPUT("f16", columns, count, __VA_ARGS__); \
    }
    if constexpr (kColumns == 24) {
        WGMMA_OUTPUT_OF_TYPE(24, 12, "%12", "%13", "%14", "%15", "%16", "%17");
    } else if constexpr (kColumns == 32) {
        WGMMA_OUTPUT_OF_TYPE(32, 16, "%16", "%17", "%18", "%19", "%20", "%21");
    } else if constexpr (kColumns == 64) {
        WGMMA_OUTPUT_OF_TYPE(64, 32, "%32", "%33", "%34", "%35", "%36", "%37");
    } else if constexpr (kColumns == 72) {
        WGMMA_OUTPUT_OF_TYPE(72, 36, "%36", "%37", "%38", "%39", "%40", "%41");
    } else if constexpr (kColumns == 80) {
        WGMMA_OUTPUT_OF_TYPE(80, 40, "%40", "%41", "%42", "%43", "%44", "%45");
    } else if constexpr (kColumns == 96) {
        WGMMA_OUTPUT_OF_TYPE(96, 48, "%48", "%49", "%50", "%51", "%52", "%53");
    } else if constexpr (kColumns == 128) {
        WGMMA_OUTPUT_OF_TYPE(128, 64, "%64", "%65", "%66", "%67", "%68", "%69");
    } else {
        static_assert(kColumns == 32, "write the instruction for this number of columns above");
    }
#undef WGMMA_OUTPUT_OF_TYPE
#undef WGMMA_OUTPUT
}

// Accumulator += A B of kSteps times 16 rows of B.
template <typename T, int kColumns, int kSteps>
__device__ __forceinline__ void issue_output(float (&d)[kColumns / 2], const uint32_t (&a)[kSteps][4], int b_rows) {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        wgmma_output<T, kColumns>(d, a[step], tile_descriptor(b_rows + step * kDepthStepDownRows));
    }
}

}  // namespace sparse_attn
