// Host side of the tensor copy engine: how a strided tensor of tokens is described to it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "params.h"

namespace sparse_attn {

// Taken from the driver at run time, so that the library loads where there is no driver.
inline auto tensor_map_encoder() {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                        "block_sparse_attention: the CUDA driver must offer cuTensorMapEncodeTiled (CUDA 12 or later)");
        return reinterpret_cast<Encode>(function);
    }();
    return encode;
}

// Extents of the box that one copy moves.
struct Box {
    int columns, tile_width, tile_height;
};

// Part of a tensor [batch, heads, tokens, columns] whose tokens, from `first` on, form `height` rows of `width`.
struct Part {
    int64_t first, width, height;
};

inline CUtensorMap encode_part(const char* name, const torch::stable::Tensor& tensor, const Part& part, const Box& box,
                               bool swizzled) {
    CUtensorMap map{};
    if (part.width * part.height == 0) return map;
    constexpr int64_t kElement = 2;
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    const auto address = static_cast<char*>(tensor.mutable_data_ptr()) + part.first * strides[2] * kElement;
    const cuuint64_t extents[5] = {cuuint64_t(sizes[3]), cuuint64_t(sizes[1]), cuuint64_t(part.width),
                                   cuuint64_t(part.height), cuuint64_t(sizes[0])};
    // The stride of an extent of 1 means nothing, and frameworks fill in anything.
    const int64_t steps[4] = {strides[1], strides[2], strides[2] * part.width, strides[0]};
    cuuint64_t byte_strides[4];
    for (int i = 0; i < 4; i++) byte_strides[i] = extents[i + 1] == 1 ? 16 : cuuint64_t(steps[i] * kElement);
    const cuuint32_t extent_of_box[5] = {cuuint32_t(box.columns), 1, cuuint32_t(box.tile_width),
                                         cuuint32_t(box.tile_height), 1};
    const cuuint32_t every[5] = {1, 1, 1, 1, 1};
    const auto widest = box.columns * kElement > 32 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
    const auto swizzle = swizzled ? widest : CU_TENSOR_MAP_SWIZZLE_NONE;
    const auto encode = [&] {
        return tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, address, extents, byte_strides, extent_of_box,
                                    every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult result = encode();
    // A thread that has not used the device yet, as autograd's may be, has no current context.
    int device = 0;
    if (result == CUDA_ERROR_INVALID_CONTEXT && cudaGetDevice(&device) == cudaSuccess &&
        cudaSetDevice(device) == cudaSuccess) {
        result = encode();
    }
    STD_TORCH_CHECK(result == CUDA_SUCCESS, "block_sparse_attention: ", name,
                    " must start at a multiple of 16 bytes and have strides that are multiples of 16 bytes, got strides ",
                    strides[0], ", ", strides[1], ", ", strides[2], " (driver error ", int(result), ")");
    return map;
}

// `divide` is 2 for boxes of half a block.
inline TensorMaps encode_tokens(const char* name, const torch::stable::Tensor& tensor, const GridParams& grid, int columns,
                                bool swizzled, int divide = 1) {
    const int64_t patches = int64_t(grid.height) * grid.width;
    const Box extras{columns, kBlockTokens / divide, 1};
    Box tile{columns, grid.tile_width, grid.tile_height};
    (tile.tile_height > 1 ? tile.tile_height : tile.tile_width) /= divide;
    TensorMaps maps;
    maps.prefix = encode_part(name, tensor, {0, grid.prefix, 1}, extras, swizzled);
    maps.image = encode_part(name, tensor, {grid.prefix, grid.width, grid.height}, tile, swizzled);
    maps.suffix = encode_part(name, tensor, {grid.prefix + patches, grid.suffix, 1}, extras, swizzled);
    return maps;
}

}  // namespace sparse_attn
