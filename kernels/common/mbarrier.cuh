// Shared-memory barriers that count arrivals and bytes of asynchronous copies, and the warpgroups' named barriers.
#pragma once

#include <cstdint>

namespace sparse_attn {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Before a barrier is initialised again.
__device__ __forceinline__ void barrier_invalidate(uint64_t* barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// A value that all lanes of the warp share, in a form the compiler knows to be shared: what is computed from it (loop
// counters, buffer addresses, matrix descriptors) then stays in uniform registers instead of being moved there each time.
__device__ __forceinline__ int warp_uniform(int value) { return __reduce_max_sync(0xffffffff, value); }

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Called by a whole warp that has done all its reads of a buffer: one arrival.
__device__ __forceinline__ void barrier_leave(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Called by a whole warp. Reads shared memory through the lane whose arrival frees it, so that the read is ordered before
// the next write. Not for negative values.
__device__ __forceinline__ int from_lane_0(const int& value) { return warp_uniform(threadIdx.x % 32 == 0 ? value : 0); }

// Called by a whole warp; lane 0 arrives.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    if (threadIdx.x % 32 == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                     : "memory");
    }
    __syncwarp();
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Waits for the 128 threads of one warpgroup. Barrier 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// Two warpgroups take turns: one waits for its turn, which the other gives it.
constexpr int kFirstTurnBarrier = 4;
__device__ __forceinline__ void await_turn(int warpgroup) {
    asm volatile("bar.sync %0, 256;" ::"r"(warpgroup + kFirstTurnBarrier) : "memory");
}
__device__ __forceinline__ void give_turn(int warpgroup) {
    asm volatile("bar.arrive %0, 256;" ::"r"(warpgroup + kFirstTurnBarrier) : "memory");
}

// Orders this thread's ordinary shared-memory writes before later reads by the copy engine or the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace sparse_attn
