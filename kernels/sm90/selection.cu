// Chooses the variants of the kernels that choose blocks, and launches them.
#include "../selection/choose_blocks.cuh"
#include "../selection/pool_blocks.cuh"
#include "launch_device.cuh"
#include "launch_selection.h"

namespace sparse_attn {
namespace {

constexpr size_t kMostShared = 227 * 1024;

// Of the kernels that give a row of lists to a warp.
constexpr int kListThreads = 128;
unsigned list_thread_blocks(int64_t lists) {
    constexpr int kWarps = kListThreads / 32;
    return unsigned((lists + kWarps - 1) / kWarps);
}

template <int kColumns>
cudaError_t launch_choose(const ChooseParams& params, const dim3& blocks, int device, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const size_t bytes = choose_shared_bytes(params);
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    const cudaError_t error = allow_shared_memory(choose_blocks<kColumns>, kMostShared, device, allowed);
    if (error != cudaSuccess) return error;
    return launch_overlapping(choose_blocks<kColumns>, blocks, kChooseThreads, bytes, params, stream);
}

using Launch = cudaError_t (*)(const ChooseParams&, const dim3&, int, cudaStream_t);

Launch launch_for(int columns) {
    if (columns <= 32) return launch_choose<1>;
    if (columns <= 64) return launch_choose<2>;
    if (columns <= 128) return launch_choose<4>;
    if (columns <= 256) return launch_choose<8>;
    return columns <= 512 ? launch_choose<16> : launch_choose<32>;
}

}  // namespace

cudaError_t launch_pool_blocks(PoolParams params, bool is_bfloat16, cudaStream_t stream) {
    const unsigned teams = unsigned(32 / (params.head_dim / 8) * (kPoolThreads / 32));  // of a thread block
    const unsigned query_blocks = (params.query.parts + teams - 1) / teams, key_blocks = (params.key.parts + teams - 1) / teams;
    params.query_teams = query_blocks * teams;
    const auto kernel = is_bfloat16 ? pool_blocks<__nv_bfloat16> : pool_blocks<__half>;
    kernel<<<query_blocks + key_blocks, kPoolThreads, 0, stream>>>(params);
    return cudaGetLastError();
}

bool choose_blocks_fits(const ChooseParams& params) { return choose_shared_bytes(params) <= kMostShared; }

cudaError_t launch_choose_blocks(const ChooseParams& params, int64_t batch, int device, cudaStream_t stream) {
    const dim3 blocks((params.query_grid.num_blocks + kChooseBlocks - 1) / kChooseBlocks, params.heads, unsigned(batch));
    return launch_for(params.key_grid.num_blocks)(params, blocks, device, stream);
}

cudaError_t launch_order_rows(const ChooseParams& params, int64_t heads, cudaStream_t stream) {
    order_rows<<<list_thread_blocks(heads), kListThreads, 0, stream>>>(params.key_counts, params.row_order, heads,
                                                                       params.query_grid.num_blocks);
    return cudaGetLastError();
}

cudaError_t launch_list_queries(const ChooseParams& params, int32_t* query_counts, int32_t* query_indices, int64_t heads,
                                cudaStream_t stream) {
    const int rows = params.query_grid.num_blocks, columns = params.key_grid.num_blocks;
    list_queries<<<list_thread_blocks(heads * columns), kListThreads, 0, stream>>>(params.blocks, query_counts,
                                                                                   query_indices, heads, rows, columns);
    return cudaGetLastError();
}

}  // namespace sparse_attn
