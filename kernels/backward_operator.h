// The operator of the backward pass: checks, parameters, tensor maps, choice of head_dim, launches.
#pragma once

#include "operator_arguments.h"
#include "sm90/launch.h"
#include "tensor_maps.h"

namespace sparse_attn {

struct BackwardLaunches {
    cudaError_t (*query)(const BackwardParams&, int, cudaStream_t);
    cudaError_t (*key)(const BackwardParams&, int, cudaStream_t);
    cudaError_t (*fused)(const BackwardParams&, int, cudaStream_t);
};

template <typename T, int kHeadDim>
BackwardLaunches backward_of() {
    return {launch_backward_query<T, kHeadDim>, launch_backward_key<T, kHeadDim>, launch_backward_fused<T, kHeadDim>};
}

template <typename T>
BackwardLaunches backward_for(int64_t native_head_dim) {
    switch (native_head_dim) {
        case 32: return backward_of<T, 32>();
        case 64: return backward_of<T, 64>();
        case 80: return backward_of<T, 80>();
        case 96: return backward_of<T, 96>();
        default: return backward_of<T, 128>();
    }
}

inline void backward_sm90(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& grad_out,
                          const Tensor& out, const Tensor& lse, const std::optional<Tensor>& grad_lse,
                          const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                          const Tensor& statistics, const std::optional<Tensor>& grad_rel_h,
                          const std::optional<Tensor>& grad_rel_w, const std::optional<Tensor>& rel_w_sums,
                          const std::optional<Tensor>& grad_query_sums, const Tensor& progress,
                          const std::optional<Tensor>& rel_offsets, const std::optional<Tensor>& rel_sums,
                          const std::optional<Tensor>& key_counts, const std::optional<Tensor>& key_indices,
                          const std::optional<Tensor>& row_order, const std::optional<Tensor>& query_counts,
                          const std::optional<Tensor>& query_indices, const std::optional<Tensor>& rel_h,
                          const std::optional<Tensor>& rel_w, const std::optional<Tensor>& key_padding_mask,
                          const std::optional<Tensor>& dropout_seed, const std::vector<int64_t>& query_grid,
                          const std::vector<int64_t>& key_grid, double scale, double dropout_p) {
    BackwardParams params{};
    params.query_grid = grid_params("query_grid", query_grid);
    params.key_grid = grid_params("key_grid", key_grid);
    const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3), key_heads = key.size(1);
    const int64_t query_tokens = tokens(params.query_grid), key_tokens = tokens(params.key_grid);
    const int64_t query_blocks = params.query_grid.num_blocks, key_blocks = params.key_grid.num_blocks;
    const ScalarType dtype = dtype_of(query);
    const std::vector<int64_t> query_shape{batch, heads, query_tokens, head_dim};
    const std::vector<int64_t> key_shape{batch, key_heads, key_tokens, head_dim};
    check_tensor("query", query, dtype, query_shape);
    check_tensor("key", key, dtype, key_shape);
    check_tensor("value", value, dtype, key_shape);
    check_tensor("grad_out", grad_out, dtype, query_shape);
    check_tensor("out", out, dtype, query_shape);
    check_tensor("grad_query", grad_query, dtype, query_shape);
    check_tensor("grad_key", grad_key, dtype, key_shape);
    check_tensor("grad_value", grad_value, dtype, key_shape);
    check_tensor("lse", lse, ScalarType::Float, {batch, heads, query_tokens});
    check_tensor("statistics", statistics, ScalarType::Float, {batch, heads, query_blocks, kBlockTokens / 2, 4});
    check_contiguous("lse", lse);
    check_contiguous("statistics", statistics);
    check_sizes(batch, heads, key_heads, head_dim, scale);
    if (batch == 0 || heads == 0) return;

    params.batch = int(batch);
    params.query_heads = int(heads);
    params.heads_per_key_head = int(heads / key_heads);
    params.scale = float(scale);
    params.scale_log2 = float(scale * 1.4426950408889634);
    params.inverse_scale = float(1.0 / scale);
    params.lse = static_cast<const float*>(lse.mutable_data_ptr());
    params.statistics = static_cast<float*>(statistics.mutable_data_ptr());
    if (grad_lse.has_value()) check_tensor("grad_lse", *grad_lse, ScalarType::Float, {batch, heads, query_tokens});
    check_contiguous("grad_lse", grad_lse);
    params.grad_lse = pointer<float>(grad_lse);

    const auto encode = [](const char* name, const Tensor& tensor, const GridParams& grid) {
        return encode_tokens(name, tensor, grid, 64, true, 2);
    };
    params.query = encode("query", query, params.query_grid);
    params.key = encode("key", key, params.key_grid);
    params.value = encode("value", value, params.key_grid);
    params.grad_out = encode("grad_out", grad_out, params.query_grid);
    params.out = encode("out", out, params.query_grid);
    params.grad_query = encode("grad_query", grad_query, params.query_grid);
    params.grad_key = encode("grad_key", grad_key, params.key_grid);
    params.grad_value = encode("grad_value", grad_value, params.key_grid);
    STD_TORCH_CHECK(rel_h.has_value() == rel_w.has_value(), "block_sparse_attention: rel_h must come with rel_w");
    if (rel_h.has_value()) {
        const GridParams& grid = params.key_grid;
        STD_TORCH_CHECK(grid.tile_height == 8 && grid.tile_width == 16,
                        "block_sparse_attention: key_grid must have tiles of 8 x 16 for a relative position");
        check_tensor("rel_h", *rel_h, dtype, {batch, heads, query_tokens, grid.height});
        check_tensor("rel_w", *rel_w, dtype, {batch, heads, query_tokens, grid.width});
        check_tensor("grad_rel_h", *grad_rel_h, dtype, {batch, heads, query_tokens, grid.height});
        check_tensor("grad_rel_w", *grad_rel_w, dtype, {batch, heads, query_tokens, grid.width});
        check_contiguous("grad_rel_h", grad_rel_h);
        check_contiguous("grad_rel_w", grad_rel_w);
        params.grad_rel_h = pointer<void>(grad_rel_h);
        params.grad_rel_w = pointer<void>(grad_rel_w);
        params.relative_position = true;
        // The fused kernel reads rel_w in the swizzle, and rel_h not itself.
        const bool is_fused = grad_query_sums.has_value();
        params.rel_h = encode_tokens("rel_h", *rel_h, params.query_grid, is_fused ? 64 : grid.tile_height, is_fused, 2);
        params.rel_w = encode_tokens("rel_w", *rel_w, params.query_grid, grid.tile_width, is_fused, 2);
        if (is_fused) {
            const int64_t rows = grid.tile_blocks / grid.tile_columns, extra = grid.prefix + grid.suffix > 0;
            STD_TORCH_CHECK(fuses_relative_position(native_head_dim(head_dim, false)),
                            "block_sparse_attention: grad_query_sums must not come with a relative position, got head_dim ",
                            head_dim);
            check_tensor("rel_offsets", *rel_offsets, ScalarType::Float,
                        {batch, heads, query_blocks, rows + extra, kBlockTokens * grid.tile_height});
            check_tensor("rel_sums", *rel_sums, ScalarType::Float,
                        {batch, heads, query_blocks, rows + 2 * grid.tile_columns, kBlockTokens * 8});
            check_contiguous("rel_offsets", rel_offsets);
            check_contiguous("rel_sums", rel_sums);
            params.rel_offsets = pointer<float>(rel_offsets);
            params.rel_sums = pointer<float>(rel_sums);
        } else {
            check_tensor("rel_w_sums", *rel_w_sums, ScalarType::Float,
                        {batch, heads, query_blocks, grid.tile_columns, kBlockTokens * grid.tile_width});
            check_contiguous("rel_w_sums", rel_w_sums);
            params.rel_w_sums = pointer<float>(rel_w_sums);
        }
    }
    const Lists keys = index_lists("key_counts, key_indices", key_counts, key_indices, batch, heads, query_blocks, key_blocks);
    params.key_counts = keys.counts;
    params.key_indices = keys.indices;
    params.list_batch_stride = keys.batch_stride;
    params.list_head_stride = keys.head_stride;
    params.row_order = row_order_pointer(row_order, key_counts);
    const Lists queries =
        index_lists("query_counts, query_indices", query_counts, query_indices, batch, heads, key_blocks, query_blocks);
    params.query_counts = queries.counts;
    params.query_indices = queries.indices;
    params.query_list_batch_stride = queries.batch_stride;
    params.query_list_head_stride = queries.head_stride;
    if (key_padding_mask.has_value()) check_tensor("key_padding_mask", *key_padding_mask, ScalarType::Bool, {batch, key_tokens});
    check_contiguous("key_padding_mask", key_padding_mask);
    params.key_padding = pointer<uint8_t>(key_padding_mask);
    params.mask_keys = params.key_padding != nullptr || has_ragged_blocks(params.key_grid);
    params.dropout = dropout_params(dropout_seed, dropout_p);

    const int64_t watched = batch * (key_heads + heads * query_blocks * 2);  // by the fused kernel
    check_tensor("progress", progress, ScalarType::Int, {1 + (grad_query_sums.has_value() ? watched : 0)});
    check_contiguous("progress", progress);
    params.blocks_taken = static_cast<int*>(progress.mutable_data_ptr());
    if (grad_query_sums.has_value()) {
        STD_TORCH_CHECK(!dropout_seed.has_value(), "block_sparse_attention: grad_query_sums must come without dropout");
        check_tensor("grad_query_sums", *grad_query_sums, ScalarType::Float,
                    {batch, heads, query_blocks, kBlockTokens, native_head_dim(head_dim, false)});
        check_contiguous("grad_query_sums", grad_query_sums);
        params.grad_query_sums = pointer<float>(grad_query_sums);
        params.key_blocks_added = params.blocks_taken + 1;
        params.finished = params.key_blocks_added + batch * key_heads;
    }

    const int32_t device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const bool is_bfloat16 = dtype == ScalarType::BFloat16;
    const int64_t native = native_head_dim(head_dim, params.dropout.seed != nullptr);
    const BackwardLaunches launches = is_bfloat16 ? backward_for<__nv_bfloat16>(native) : backward_for<__half>(native);
    const cudaStream_t stream = current_stream(device);
    if (grad_query_sums.has_value()) {
        check_launch(launches.fused(params, device, stream));
        return;
    }
    check_launch(launches.query(params, device, stream));
    check_launch(launches.key(params, device, stream));
}

}  // namespace sparse_attn
