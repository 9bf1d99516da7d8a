// A kernel that follows another in a stream may begin while the last thread blocks of that one still run, as far as it is
// launched to (`launch_overlapping`): it does what does not depend on the other, then waits for its end.
#pragma once

namespace sparse_attn {

// To be called early: thread blocks of the next kernel may begin once all of this one have called it or ended.
__device__ __forceinline__ void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits for the end of the kernel before, with all its writes. Every thread block must call it, or end only when another
// does: what follows in the stream waits for this kernel alone.
__device__ __forceinline__ void await_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace sparse_attn
