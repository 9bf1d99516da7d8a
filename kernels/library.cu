// Registers the CUDA implementation of the operators that Python defines (schema, fake kernels and autograd live there).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "params.h"
#include "sm90/launch.h"
#include "tensor_maps.h"

namespace sparse_attn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As TokenGrid packs it: {height, width, prefix, suffix, tile height, tile width}
GridParams grid_params(const char* name, const std::vector<int64_t>& grid) {
    STD_TORCH_CHECK(grid.size() == 6, "block_sparse_attention: ", name, " must have 6 entries, got ", grid.size());
    GridParams params{};
    params.height = int(grid[0]);
    params.width = int(grid[1]);
    params.prefix = int(grid[2]);
    params.suffix = int(grid[3]);
    params.tile_height = int(grid[4]);
    params.tile_width = int(grid[5]);
    const bool fits = params.tile_height * params.tile_width == kBlockTokens && params.tile_width >= 1 &&
                      (params.tile_width & (params.tile_width - 1)) == 0;
    STD_TORCH_CHECK(fits, "block_sparse_attention: ", name, " must have tiles of ", kBlockTokens,
                    " tokens whose sides are powers of two, got ", params.tile_height, " x ", params.tile_width);
    while ((1 << params.tile_width_log2) < params.tile_width) params.tile_width_log2++;
    params.tile_height_log2 = kBlockTokensLog2 - params.tile_width_log2;
    params.prefix_blocks = (params.prefix + kBlockTokens - 1) / kBlockTokens;
    params.tile_columns = (params.width + params.tile_width - 1) / params.tile_width;
    params.tile_blocks = params.tile_columns * ((params.height + params.tile_height - 1) / params.tile_height);
    const uint64_t columns = uint64_t(params.tile_columns);
    STD_TORCH_CHECK(uint64_t(params.tile_blocks) * columns < (uint64_t(1) << 32), "block_sparse_attention: ", name,
                    " must have fewer blocks, got ", params.tile_blocks, " in rows of ", columns);
    params.tile_columns_reciprocal = uint32_t(((uint64_t(1) << 32) + columns - 1) / columns);
    params.num_blocks = params.prefix_blocks + params.tile_blocks + (params.suffix + kBlockTokens - 1) / kBlockTokens;
    return params;
}

bool has_ragged_blocks(const GridParams& grid) {
    return grid.prefix % kBlockTokens || grid.suffix % kBlockTokens || grid.height % grid.tile_height ||
           grid.width % grid.tile_width;
}

int64_t tokens(const GridParams& grid) { return grid.prefix + int64_t(grid.height) * grid.width + grid.suffix; }

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
    bool matches = tensor.dim() == int64_t(expected.size());
    for (size_t i = 0; matches && i < expected.size(); i++) {
        matches = expected[i] < 0 || tensor.size(int64_t(i)) == expected[i];
    }
    STD_TORCH_CHECK(matches, "block_sparse_attention: ", name, " must have the shape its grid and query ask for");
}

using Launch = cudaError_t (*)(const ForwardParams&, bool, int, cudaStream_t);

template <typename T>
Launch forward_for(int64_t head_dim) {
    if (head_dim <= 32) return launch_forward<T, 32>;
    if (head_dim <= 64) return launch_forward<T, 64>;
    if (head_dim <= 80) return launch_forward<T, 80>;
    if (head_dim <= 96) return launch_forward<T, 96>;
    return launch_forward<T, 128>;
}

void forward_sm90(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                  const std::optional<Tensor>& lse, const std::optional<Tensor>& key_counts,
                  const std::optional<Tensor>& key_indices, const std::optional<Tensor>& row_order,
                  const std::optional<Tensor>& rel_h, const std::optional<Tensor>& rel_w,
                  const std::optional<Tensor>& key_padding_mask, const std::vector<int64_t>& query_grid,
                  const std::vector<int64_t>& key_grid, double scale) {
    ForwardParams params{};
    params.query_grid = grid_params("query_grid", query_grid);
    params.key_grid = grid_params("key_grid", key_grid);
    const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3), key_heads = key.size(1);
    const int64_t query_tokens = tokens(params.query_grid), key_tokens = tokens(params.key_grid);
    check_shape("query", query, {batch, heads, query_tokens, head_dim});
    check_shape("key", key, {batch, key_heads, key_tokens, head_dim});
    check_shape("value", value, {batch, key_heads, key_tokens, head_dim});
    check_shape("out", out, {batch, heads, query_tokens, head_dim});
    STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 128,
                    "block_sparse_attention: head_dim must be a multiple of 8 up to 128, got ", head_dim);
    STD_TORCH_CHECK(scale > 0, "block_sparse_attention: scale must be positive, got ", scale);
    STD_TORCH_CHECK(heads <= 65535 && batch <= 65535, "block_sparse_attention: query must have up to 65535 batch entries"
                    " and heads, got ", batch, " and ", heads);
    if (batch == 0 || heads == 0) return;

    params.batch = int(batch);
    params.query_heads = int(heads);
    params.heads_per_key_head = int(heads / key_heads);
    params.scale = float(scale);
    params.scale_log2 = float(scale * 1.4426950408889634);
    params.inverse_scale = float(1.0 / scale);

    params.query = encode_tokens("query", query, params.query_grid, 64, true);
    params.key = encode_tokens("key", key, params.key_grid, 64, true);
    params.value = encode_tokens("value", value, params.key_grid, 64, true);
    params.out = encode_tokens("out", out, params.query_grid, 64, true, 2);
    if (rel_h.has_value()) {
        STD_TORCH_CHECK(params.key_grid.tile_height == 8 && params.key_grid.tile_width == 16,
                        "block_sparse_attention: key_grid must have tiles of 8 x 16 for a relative position");
        check_shape("rel_h", *rel_h, {batch, heads, query_tokens, params.key_grid.height});
        check_shape("rel_w", *rel_w, {batch, heads, query_tokens, params.key_grid.width});
        params.rel_h = encode_tokens("rel_h", *rel_h, params.query_grid, params.key_grid.tile_height, false);
        params.rel_w = encode_tokens("rel_w", *rel_w, params.query_grid, params.key_grid.tile_width, false);
    }
    if (key_counts.has_value()) {
        check_shape("key_counts", *key_counts, {-1, -1, params.query_grid.num_blocks});
        check_shape("key_indices", *key_indices, {-1, -1, params.query_grid.num_blocks, params.key_grid.num_blocks});
        params.key_counts = static_cast<const int32_t*>(key_counts->mutable_data_ptr());
        params.key_indices = static_cast<const int32_t*>(key_indices->mutable_data_ptr());
        STD_TORCH_CHECK(key_counts->is_contiguous() && key_indices->is_contiguous() &&
                            (!row_order.has_value() || row_order->is_contiguous()),
                        "block_sparse_attention: key_counts, key_indices and row_order must be contiguous");
        if (row_order.has_value()) params.row_order = static_cast<const int32_t*>(row_order->mutable_data_ptr());
        const int64_t list_heads = key_counts->size(1);
        params.list_head_stride = list_heads > 1 ? params.query_grid.num_blocks : 0;
        params.list_batch_stride = key_counts->size(0) > 1 ? int(list_heads * params.query_grid.num_blocks) : 0;
    }
    if (key_padding_mask.has_value()) {
        check_shape("key_padding_mask", *key_padding_mask, {batch, key_tokens});
        STD_TORCH_CHECK(key_padding_mask->is_contiguous(), "block_sparse_attention: key_padding_mask must be contiguous");
        params.key_padding = static_cast<const uint8_t*>(key_padding_mask->mutable_data_ptr());
    }
    params.mask_keys = params.key_padding != nullptr || has_ragged_blocks(params.key_grid);
    if (lse.has_value()) params.lse = static_cast<float*>(lse->mutable_data_ptr());

    const int32_t device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                    "block_sparse_attention: PyTorch must tell the current stream");
    const Launch launch = query.scalar_type() == ScalarType::BFloat16 ? forward_for<__nv_bfloat16>(head_dim)
                                                                      : forward_for<__half>(head_dim);
    const cudaError_t error = launch(params, rel_h.has_value(), device, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "block_sparse_attention: the kernel must launch, got ",
                    cudaGetErrorString(error));
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn_modules, CUDA, library) {
    library.impl("forward_sm90", TORCH_BOX(&sparse_attn::forward_sm90));
}
