// What the operators have in common: geometry and lists out of Python's arguments, and their checks (host).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <vector>

#include "params.h"
#include "sm90/launch.h"

namespace sparse_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// With which the kernels divide by a number above 1: ceil(2^32 / divisor).
inline uint32_t reciprocal(int64_t divisor) {
    return uint32_t(((uint64_t(1) << 32) + uint64_t(divisor) - 1) / uint64_t(divisor));
}

// As TokenGrid packs it: {height, width, prefix, suffix, tile height, tile width}
inline GridParams grid_params(const char* name, const std::vector<int64_t>& grid) {
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
    params.tile_columns_reciprocal = reciprocal(params.tile_columns);
    params.num_blocks = params.prefix_blocks + params.tile_blocks + (params.suffix + kBlockTokens - 1) / kBlockTokens;
    return params;
}

inline bool has_ragged_blocks(const GridParams& grid) {
    return grid.prefix % kBlockTokens || grid.suffix % kBlockTokens || grid.height % grid.tile_height ||
           grid.width % grid.tile_width;
}

inline int64_t tokens(const GridParams& grid) { return grid.prefix + int64_t(grid.height) * grid.width + grid.suffix; }

// A size that is negative is any.
inline void check_tensor(const char* name, const Tensor& tensor, ScalarType type, const std::vector<int64_t>& expected) {
    bool matches = tensor.dim() == int64_t(expected.size());
    for (size_t i = 0; matches && i < expected.size(); i++) {
        matches = expected[i] < 0 || tensor.size(int64_t(i)) == expected[i];
    }
    STD_TORCH_CHECK(matches, "block_sparse_attention: ", name, " must have the shape its grid and query ask for");
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == type, "block_sparse_attention: ", name,
                    " must be on the GPU, in the dtype that is computed with");
}

// The dtype of a call, which must be one that kernels are compiled for.
inline ScalarType dtype_of(const Tensor& query) {
    const ScalarType dtype = query.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "block_sparse_attention: query must be bfloat16 or float16");
    return dtype;
}

inline void check_sizes(int64_t batch, int64_t heads, int64_t key_heads, int64_t head_dim, double scale) {
    STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 128,
                    "block_sparse_attention: head_dim must be a multiple of 8 up to 128, got ", head_dim);
    STD_TORCH_CHECK(scale > 0, "block_sparse_attention: scale must be positive, got ", scale);
    STD_TORCH_CHECK(heads <= 65535 && batch <= 65535, "block_sparse_attention: query must have up to 65535 batch entries"
                    " and heads, got ", batch, " and ", heads);
    STD_TORCH_CHECK(heads == 0 || (key_heads > 0 && heads % key_heads == 0),
                    "block_sparse_attention: query must have a multiple of the key's heads, got ", heads, " and ", key_heads);
}

inline void check_contiguous(const char* name, const std::optional<Tensor>& tensor) {
    STD_TORCH_CHECK(!tensor.has_value() || tensor->is_contiguous(), "block_sparse_attention: ", name,
                    " must be contiguous");
}

// Null where there is none.
template <typename T>
T* pointer(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// Index lists [B | 1, Hq | 1, rows, entries], with their counts, and strides in rows: 0 where the lists are shared.
struct Lists {
    const int32_t *counts = nullptr, *indices = nullptr;
    int batch_stride = 0, head_stride = 0;
};

inline Lists index_lists(const char* name, const std::optional<Tensor>& counts, const std::optional<Tensor>& indices,
                         int64_t batch, int64_t heads, int64_t rows, int64_t entries) {
    if (!counts.has_value()) return {};
    const int64_t own_batch = counts->size(0), own_heads = counts->size(1);
    STD_TORCH_CHECK(indices.has_value() && (own_batch == 1 || own_batch == batch) && (own_heads == 1 || own_heads == heads),
                    "block_sparse_attention: ", name, " must be for every batch entry and head, or for all at once");
    check_tensor(name, *counts, ScalarType::Int, {own_batch, own_heads, rows});
    check_tensor(name, *indices, ScalarType::Int, {own_batch, own_heads, rows, entries});
    check_contiguous(name, counts);
    check_contiguous(name, indices);
    return {pointer<int32_t>(counts), pointer<int32_t>(indices), own_batch > 1 ? int(own_heads * rows) : 0,
            own_heads > 1 ? int(rows) : 0};
}

// In the shape of the counts of the lists that it orders.
inline int32_t* row_order_pointer(const std::optional<Tensor>& row_order, const std::optional<Tensor>& counts) {
    if (!row_order.has_value() || !counts.has_value()) return nullptr;
    check_tensor("row_order", *row_order, ScalarType::Int, {counts->size(0), counts->size(1), counts->size(2)});
    check_contiguous("row_order", row_order);
    return pointer<int32_t>(row_order);
}

inline DropoutParams dropout_params(const std::optional<Tensor>& seed, double dropout_p) {
    constexpr uint32_t kResolution = 1 << 24;
    if (!seed.has_value()) return {};
    check_tensor("dropout_seed", *seed, ScalarType::Long, {1});
    DropoutParams params{};
    params.seed = pointer<int64_t>(seed);
    params.threshold = uint32_t(std::nearbyint(dropout_p * kResolution));
    params.inverse_keep = params.threshold < kResolution ? float(double(kResolution) / (kResolution - params.threshold)) : 0;
    return params;
}

// The head_dim that kernels are compiled for and that this one runs as.
inline int64_t native_head_dim(int64_t head_dim, bool has_dropout) {
    for (const int64_t native : {32, 64, 80, 96}) {
        if (head_dim <= native && (!has_dropout || compiled_with_dropout(int(native)))) return native;
    }
    return 128;
}

inline cudaStream_t current_stream(int32_t device) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                    "block_sparse_attention: PyTorch must tell the current stream");
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be blamed for it
    STD_TORCH_CHECK(error == cudaSuccess, "block_sparse_attention: the kernel must launch, got ",
                    cudaGetErrorString(error));
}

}  // namespace sparse_attn
