// Features of every part of the blocks of queries and keys: what sparse_attn_modules/patterns/block_features.py defines.
// A team of lanes, one for each 16 bytes of a token's head, reads the samples of one part of one head, up to 8 loads in
// flight each; teams beside each other take heads beside each other, which lie together in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/overlapping_launch.cuh"
#include "part.cuh"

namespace sparse_attn {

constexpr int kPoolThreads = 128;

template <typename T>
__device__ __forceinline__ void add_to(float (&sums)[8], float& squares, const uint4& loaded) {
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair;
        if constexpr (std::is_same_v<T, __half>) {
            pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        } else {
            pair = {__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
        }
        sums[2 * i] += pair.x;
        sums[2 * i + 1] += pair.y;
        squares = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares));
    }
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) pool_blocks(const __grid_constant__ PoolParams params) {
    let_next_kernel_begin();
    const int lane = threadIdx.x % 32, lanes = params.head_dim / 8, teams = 32 / lanes;
    const int chunk = lane % lanes, team = lane / lanes;
    unsigned index = (blockIdx.x * (kPoolThreads / 32) + threadIdx.x / 32) * teams + team;
    const bool is_key = index >= params.query_teams;
    const PoolTensor& tensor = is_key ? params.key : params.query;
    if (is_key) index -= params.query_teams;
    const bool works = team < teams && index < tensor.parts;

    const unsigned parts = tensor.grid.num_blocks * kParts, place = index / tensor.heads;
    const unsigned head = index - place * tensor.heads, batch = place / parts, part_index = place - batch * parts;
    const Part part = part_of_block(tensor.grid, tensor.cut, part_index / kParts, part_index % kParts);
    const T* data = static_cast<const T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride + chunk * 8;

    float sums[8] = {}, squares = 0;
    constexpr int kInFlight = 8;
    int samples = 0;
    for (int first = 0; first < part.samples(); first += kInFlight) {
        uint4 loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; i++) {
            const int slot = part.slot(first + i);
            const int y = slot >> part.width_log2, x = slot & ((1 << part.width_log2) - 1);
            loaded[i] = make_uint4(0, 0, 0, 0);
            if (works && y < part.height && x < part.width) {
                const int64_t token = part.first + y * part.row_step + x;
                loaded[i] = __ldg(reinterpret_cast<const uint4*>(data + token * tensor.token_stride));
                samples++;
            }
        }
#pragma unroll
        for (int i = 0; i < kInFlight; i++) add_to<T>(sums, squares, loaded[i]);
    }

    const float inverse = 1.0f / max(samples, 1), factor = is_key ? inverse : inverse * params.scale;
    float own_length = 0, length = 0, total = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sums[i] *= factor;
        own_length = fmaf(sums[i], sums[i], own_length);
    }
    for (int i = 0; i < lanes; i++) {
        length += __shfl_sync(0xffffffff, own_length, (team * lanes + i) % 32);
        total += __shfl_sync(0xffffffff, squares, (team * lanes + i) % 32);
    }
    if (!works) return;
    const int64_t row = (int64_t(batch) * tensor.heads + head) * parts + part_index;
    float* features = tensor.features + row * (params.head_dim + kExtraFeatures);
    float4* mean = reinterpret_cast<float4*>(features + chunk * 8);
    mean[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    mean[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
    if (chunk == 0) {
        float4* extra = reinterpret_cast<float4*>(features + params.head_dim);
        const float variance = max(total * inverse - length, 0.0f) / float(params.head_dim);
        const float number = part.count() > 0 ? logf(float(part.count())) : -1e30f;
        extra[0] = is_key ? make_float4(variance, number, 0, 0) : make_float4(length / 2, 1, 0, 0);
        extra[1] = make_float4(0, 0, 0, 0);
    }
}

}  // namespace sparse_attn
