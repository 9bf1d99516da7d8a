// What the operators that choose blocks call.
#pragma once

#include <cuda_runtime.h>

#include "../selection/params.h"

namespace sparse_attn {

// Features of the parts of all blocks.
cudaError_t launch_pool_blocks(PoolParams params, bool is_bfloat16, cudaStream_t stream);

// Whether what a thread block that chooses blocks keeps fits in shared memory.
bool choose_blocks_fits(const ChooseParams& params);

// The blocks of each row, and its list of keys.
cudaError_t launch_choose_blocks(const ChooseParams& params, int64_t batch, int device, cudaStream_t stream);

// Query blocks by their number of keys, for `heads` of all batch entries.
cudaError_t launch_order_rows(const ChooseParams& params, int64_t heads, cudaStream_t stream);

// The query blocks of each key block, likewise: counts [.., K], indices [.., K, Q].
cudaError_t launch_list_queries(const ChooseParams& params, int32_t* query_counts, int32_t* query_indices, int64_t heads,
                                cudaStream_t stream);

}  // namespace sparse_attn
