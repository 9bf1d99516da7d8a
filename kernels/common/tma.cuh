// Copies between strided global tensors and 128-byte-swizzled shared-memory tiles by the tensor copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cstdint>

#include "mbarrier.cuh"

namespace sparse_attn {

struct TileCoordinates {
    int column, head, x, y, batch;
};

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Called by a whole warp; one lane issues the copy. Choosing the lane inside keeps the operands in uniform registers.
__device__ __forceinline__ void tma_load(void* destination, const CUtensorMap* map, const TileCoordinates& at,
                                         uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "@elected cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];\n"
        "}\n" ::"r"(shared_address(destination)),
        "l"(map), "r"(at.column), "r"(at.head), "r"(at.x), "r"(at.y), "r"(at.batch), "r"(shared_address(barrier))
        : "memory");
}

// Copies contiguous bytes, a multiple of 16. Called by a whole warp, likewise.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "@elected cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n"
        "}\n" ::"r"(shared_address(destination)),
        "l"(source), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* source, const TileCoordinates& at) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4, %5}], [%6];" ::"l"(map),
                 "r"(at.column), "r"(at.head), "r"(at.x), "r"(at.y), "r"(at.batch), "r"(shared_address(source))
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read their source: shared memory may be reused, or the block may end.
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until this thread's stores are done.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace sparse_attn
