// The operators that choose blocks at run time: checks, parameters, launches.
#pragma once

#include "operator_arguments.h"
#include "sm90/launch_selection.h"

namespace sparse_attn {

inline CutParams cut_params(const GridParams& grid, const std::vector<int64_t>& cut) {
    CutParams params{};
    while ((1 << params.rows_log2) < cut[0]) params.rows_log2++;
    params.columns_log2 = kPartsLog2 - params.rows_log2;
    STD_TORCH_CHECK(cut[0] * cut[1] == kParts && (1 << params.rows_log2) == cut[0] &&
                        params.rows_log2 <= grid.tile_height_log2 && params.columns_log2 <= grid.tile_width_log2,
                    "choose_blocks: a tile must be cut into ", kParts, " parts, got ", cut[0], " x ", cut[1]);
    return params;
}

inline PoolTensor pool_tensor(const char* name, const Tensor& tensor, const Tensor& features,
                              ScalarType dtype, const std::vector<int64_t>& grid, const std::vector<int64_t>& cut) {
    PoolTensor params{};
    params.grid = grid_params(name, grid);
    params.cut = cut_params(params.grid, cut);
    const int64_t parts = int64_t(params.grid.num_blocks) * kParts;
    check_tensor(name, tensor, dtype, {-1, -1, tokens(params.grid), -1});
    check_tensor("features", features, ScalarType::Float, {tensor.size(0), tensor.size(1), parts, tensor.size(3) + kExtraFeatures});
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr()) % 16 == 0 && tensor.stride(3) == 1,
                    "choose_blocks: ", name, " must have rows that begin at multiples of 16 bytes");
    STD_TORCH_CHECK(features.is_contiguous(), "choose_blocks: features must be contiguous");
    params.data = tensor.mutable_data_ptr();
    params.batch_stride = tensor.stride(0);
    params.head_stride = tensor.stride(1);
    params.token_stride = tensor.stride(2);
    params.features = static_cast<float*>(features.mutable_data_ptr());
    params.heads = unsigned(tensor.size(1));
    const int64_t all_parts = tensor.size(0) * tensor.size(1) * parts;
    STD_TORCH_CHECK(all_parts < (int64_t(1) << 30), "choose_blocks: ", name, " must have fewer blocks, got ", all_parts / kParts);
    params.parts = unsigned(all_parts);
    return params;
}

inline void pool_blocks_sm90(const Tensor& query, const Tensor& key, const Tensor& queries, const Tensor& keys,
                             const std::vector<int64_t>& query_grid, const std::vector<int64_t>& key_grid,
                             const std::vector<int64_t>& query_cut, const std::vector<int64_t>& key_cut, double scale) {
    const ScalarType dtype = dtype_of(query);
    PoolParams params{};
    params.query = pool_tensor("query", query, queries, dtype, query_grid, query_cut);
    params.key = pool_tensor("key", key, keys, dtype, key_grid, key_cut);
    params.head_dim = int(query.size(3));
    params.scale = float(scale);
    STD_TORCH_CHECK(params.head_dim % 8 == 0 && params.head_dim > 0 && params.head_dim <= 128, "choose_blocks: head_dim must be a multiple of 8 "
                    "up to 128, got ", params.head_dim);
    const int32_t device = query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const bool is_bfloat16 = dtype == ScalarType::BFloat16;
    check_launch(launch_pool_blocks(params, is_bfloat16, current_stream(device)));
}

inline void choose_blocks_sm90(const Tensor& queries, const Tensor& keys, const Tensor& blocks, const Tensor& key_counts,
                               const Tensor& key_indices, const Tensor& row_order,
                               const std::optional<Tensor>& query_counts, const std::optional<Tensor>& query_indices,
                               const std::vector<int64_t>& query_grid, const std::vector<int64_t>& key_grid,
                               const std::vector<int64_t>& query_cut, int64_t count, double mass) {
    ChooseParams params{};
    params.query_grid = grid_params("query_grid", query_grid);
    params.key_grid = grid_params("key_grid", key_grid);
    params.query_cut = cut_params(params.query_grid, query_cut);
    params.same_grids = query_grid == key_grid;
    const int64_t batch = queries.size(0), heads = queries.size(1), key_heads = keys.size(1), features = queries.size(3);
    const int64_t rows = params.query_grid.num_blocks, columns = params.key_grid.num_blocks;
    check_tensor("queries", queries, ScalarType::Float, {batch, heads, rows * kParts, features});
    check_tensor("keys", keys, ScalarType::Float, {batch, key_heads, columns * kParts, features});
    check_tensor("blocks", blocks, ScalarType::Bool, {batch, heads, rows, columns});
    STD_TORCH_CHECK(features % 8 == 0, "choose_blocks: features must be a multiple of 8, got ", features);
    STD_TORCH_CHECK(count >= 0 && count <= columns, "choose_blocks: count must be from 0 to ", columns, ", got ", count);
    STD_TORCH_CHECK(queries.is_contiguous() && keys.is_contiguous(), "choose_blocks: features must be contiguous");
    STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0 && batch <= 65535 && heads <= 65535,
                    "choose_blocks: queries must have up to 65535 batch entries and heads, a multiple of the keys', got ",
                    batch, ", ", heads, " and ", key_heads);
    check_tensor("key_counts", key_counts, ScalarType::Int, {batch, heads, rows});
    check_tensor("key_indices", key_indices, ScalarType::Int, {batch, heads, rows, columns});
    check_tensor("row_order", row_order, ScalarType::Int, {batch, heads, rows});
    STD_TORCH_CHECK(query_counts.has_value() == query_indices.has_value(),
                    "choose_blocks: query_counts must come with query_indices");
    if (query_counts.has_value()) check_tensor("query_counts", *query_counts, ScalarType::Int, {batch, heads, columns});
    if (query_indices.has_value()) {
        check_tensor("query_indices", *query_indices, ScalarType::Int, {batch, heads, columns, rows});
    }
    for (const Tensor& tensor : {blocks, key_counts, key_indices, row_order}) check_contiguous("lists", tensor);
    check_contiguous("lists", query_counts);
    check_contiguous("lists", query_indices);
    const auto data = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
    params.queries = static_cast<const float*>(queries.mutable_data_ptr());
    params.keys = static_cast<const float*>(keys.mutable_data_ptr());
    params.blocks = static_cast<uint8_t*>(blocks.mutable_data_ptr());
    params.key_counts = data(key_counts);
    params.key_indices = data(key_indices);
    params.row_order = data(row_order);
    params.heads = int(heads);
    params.heads_per_key_head = int(heads / key_heads);
    params.features = int(features);
    params.count = int(count);
    params.mass = float(mass);
    STD_TORCH_CHECK(columns <= 1024 && choose_blocks_fits(params),
                    "choose_blocks: key_grid must have up to 1024 blocks, got ", columns);

    const int32_t device = queries.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    check_launch(launch_choose_blocks(params, batch, device, stream));
    if (count == 0) check_launch(launch_order_rows(params, batch * heads, stream));
    if (query_counts.has_value() && query_indices.has_value()) {
        check_launch(launch_list_queries(params, data(*query_counts), data(*query_indices), batch * heads, stream));
    }
}

}  // namespace sparse_attn
