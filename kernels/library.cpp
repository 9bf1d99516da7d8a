// Registers the CUDA implementation of the operators that Python defines (schema, fake kernels and autograd live there).
#include <torch/csrc/stable/library.h>

#include "backward_operator.h"
#include "operator_arguments.h"
#include "params.h"
#include "selection_operators.h"
#include "sm90/launch.h"
#include "tensor_maps.h"

namespace sparse_attn {
namespace {

using Launch = cudaError_t (*)(const ForwardParams&, int, cudaStream_t);

template <typename T>
Launch forward_for(int64_t native_head_dim) {
    switch (native_head_dim) {
        case 32: return launch_forward<T, 32>;
        case 64: return launch_forward<T, 64>;
        case 80: return launch_forward<T, 80>;
        case 96: return launch_forward<T, 96>;
        default: return launch_forward<T, 128>;
    }
}

void launch(const ForwardParams& params, const Tensor& query, int32_t device) {
    const int64_t head_dim = native_head_dim(query.size(3), params.dropout.seed != nullptr);
    const bool is_bfloat16 = query.scalar_type() == ScalarType::BFloat16;
    const Launch launch = is_bfloat16 ? forward_for<__nv_bfloat16>(head_dim) : forward_for<__half>(head_dim);
    check_launch(launch(params, device, current_stream(device)));
}

void set_scale(ForwardParams& params, double scale) {
    params.scale = float(scale);
    params.scale_log2 = float(scale * 1.4426950408889634);
    params.inverse_scale = float(1.0 / scale);
}

void forward_sm90(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                  const std::optional<Tensor>& lse, const std::optional<Tensor>& key_counts,
                  const std::optional<Tensor>& key_indices, const std::optional<Tensor>& row_order,
                  const std::optional<Tensor>& rel_h, const std::optional<Tensor>& rel_w,
                  const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& dropout_seed,
                  const std::vector<int64_t>& query_grid, const std::vector<int64_t>& key_grid, double scale,
                  double dropout_p) {
    ForwardParams params{};
    params.query_grid = grid_params("query_grid", query_grid);
    params.key_grid = grid_params("key_grid", key_grid);
    const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3), key_heads = key.size(1);
    const int64_t query_tokens = tokens(params.query_grid), key_tokens = tokens(params.key_grid);
    const ScalarType dtype = dtype_of(query);
    check_tensor("query", query, dtype, {batch, heads, query_tokens, head_dim});
    check_tensor("key", key, dtype, {batch, key_heads, key_tokens, head_dim});
    check_tensor("value", value, dtype, {batch, key_heads, key_tokens, head_dim});
    check_tensor("out", out, dtype, {batch, heads, query_tokens, head_dim});
    check_sizes(batch, heads, key_heads, head_dim, scale);
    if (batch == 0 || heads == 0) return;

    params.batch = int(batch);
    params.query_heads = int(heads);
    params.heads_per_key_head = int(heads / key_heads);
    set_scale(params, scale);

    const Lists lists = index_lists("key_counts, key_indices", key_counts, key_indices, batch, heads,
                                    params.query_grid.num_blocks, params.key_grid.num_blocks);
    params.key_counts = lists.counts;
    params.key_indices = lists.indices;
    params.list_batch_stride = lists.batch_stride;
    params.list_head_stride = lists.head_stride;

    const int32_t device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    params.query = encode_tokens("query", query, params.query_grid, 64, true);
    params.key = encode_tokens("key", key, params.key_grid, 64, true);
    params.value = encode_tokens("value", value, params.key_grid, 64, true);
    params.out = encode_tokens("out", out, params.query_grid, 64, true, 2);
    STD_TORCH_CHECK(rel_h.has_value() == rel_w.has_value(), "block_sparse_attention: rel_h must come with rel_w");
    if (rel_h.has_value()) {
        STD_TORCH_CHECK(params.key_grid.tile_height == 8 && params.key_grid.tile_width == 16,
                        "block_sparse_attention: key_grid must have tiles of 8 x 16 for a relative position");
        check_tensor("rel_h", *rel_h, dtype, {batch, heads, query_tokens, params.key_grid.height});
        check_tensor("rel_w", *rel_w, dtype, {batch, heads, query_tokens, params.key_grid.width});
        params.rel_h = encode_tokens("rel_h", *rel_h, params.query_grid, params.key_grid.tile_height, false);
        params.rel_w = encode_tokens("rel_w", *rel_w, params.query_grid, params.key_grid.tile_width, false);
        params.relative_position = true;
    }
    params.row_order = row_order_pointer(row_order, key_counts);
    if (key_padding_mask.has_value()) check_tensor("key_padding_mask", *key_padding_mask, ScalarType::Bool, {batch, key_tokens});
    check_contiguous("key_padding_mask", key_padding_mask);
    params.key_padding = pointer<uint8_t>(key_padding_mask);
    params.mask_keys = params.key_padding != nullptr || has_ragged_blocks(params.key_grid);
    if (lse.has_value()) check_tensor("lse", *lse, ScalarType::Float, {batch, heads, query_tokens});
    check_contiguous("lse", lse);
    params.lse = pointer<float>(lse);
    params.dropout = dropout_params(dropout_seed, dropout_p);
    launch(params, query, device);
}

// Dense attention within windows of the image of `grid` {height, width}, which are cut from its first token on.
void forward_windows_sm90(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                          const std::optional<Tensor>& rel_h, const std::optional<Tensor>& rel_w,
                          const std::vector<int64_t>& grid, const std::vector<int64_t>& window, double scale) {
    STD_TORCH_CHECK(grid.size() == 2 && window.size() == 2 && window[0] > 0 && window[1] > 0,
                    "window_attention: grid and window must be (height, width)");
    constexpr int kTileHeight = 8, kTileWidth = 16;
    const GridParams image = grid_params("grid", {grid[0], grid[1], 0, 0, kTileHeight, kTileWidth});
    const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3), key_heads = key.size(1);
    const ScalarType dtype = dtype_of(query);
    check_tensor("query", query, dtype, {batch, heads, tokens(image), head_dim});
    check_tensor("key", key, dtype, {batch, key_heads, tokens(image), head_dim});
    check_tensor("value", value, dtype, {batch, key_heads, tokens(image), head_dim});
    check_tensor("out", out, dtype, {batch, heads, tokens(image), head_dim});
    const int64_t columns = (grid[1] + window[1] - 1) / window[1];
    const int64_t per_image = columns * ((grid[0] + window[0] - 1) / window[0]);
    check_sizes(batch * per_image, heads, key_heads, head_dim, scale);
    if (query.numel() == 0) return;

    ForwardParams params{};
    params.query_grid = grid_params("window", {window[0], window[1], 0, 0, kTileHeight, kTileWidth});
    params.key_grid = params.query_grid;
    params.windows.height = image.height;
    params.windows.width = image.width;
    params.windows.columns = int(columns);
    params.windows.per_image = int(per_image);
    params.windows.columns_reciprocal = reciprocal(columns);
    params.windows.per_image_reciprocal = reciprocal(per_image);
    params.batch = int(batch * per_image);
    params.query_heads = int(heads);
    params.heads_per_key_head = int(heads / key_heads);
    set_scale(params, scale);

    const int32_t device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    params.query = encode_tokens("query", query, image, 64, true);
    params.key = encode_tokens("key", key, image, 64, true);
    params.value = encode_tokens("value", value, image, 64, true);
    const Part all{0, image.width, image.height};
    const int last_width = params.query_grid.width - (params.query_grid.tile_columns - 1) * kTileWidth;
    params.out.image = encode_part("out", out, all, {64, last_width, 1}, true);
    params.windows.out_row = encode_part("out", out, all, {64, kTileWidth, 1}, true);
    STD_TORCH_CHECK(rel_h.has_value() == rel_w.has_value(), "block_sparse_attention: rel_h must come with rel_w");
    if (rel_h.has_value()) {
        check_tensor("rel_h", *rel_h, dtype, {batch, heads, tokens(image), window[0]});
        check_tensor("rel_w", *rel_w, dtype, {batch, heads, tokens(image), window[1]});
        params.rel_h = encode_tokens("rel_h", *rel_h, image, kTileHeight, false);
        params.rel_w = encode_tokens("rel_w", *rel_w, image, kTileWidth, false);
        params.relative_position = true;
    }
    params.mask_keys = true;  // the variants that have windows
    launch(params, query, device);
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn_modules, CUDA, library) {
    library.impl("forward_sm90", TORCH_BOX(&sparse_attn::forward_sm90));
    library.impl("forward_windows_sm90", TORCH_BOX(&sparse_attn::forward_windows_sm90));
    library.impl("backward_sm90", TORCH_BOX(&sparse_attn::backward_sm90));
    library.impl("pool_blocks_sm90", TORCH_BOX(&sparse_attn::pool_blocks_sm90));
    library.impl("choose_blocks_sm90", TORCH_BOX(&sparse_attn::choose_blocks_sm90));
}
