// Which attention weights are dropped: a pure function of the seed and of the weight's place, the same in both passes
// and on every backend. backends/dropout.py says it in Python.
#pragma once

#include "../params.h"
#include "token_grid.cuh"

namespace sparse_attn {

constexpr uint32_t kKeyStep = 0x9E3779B1;

// Finaliser of MurmurHash3.
__device__ __forceinline__ uint32_t mix_bits(uint32_t word) {
    word = (word ^ word >> 16) * 0x85EBCA6B;
    word = (word ^ word >> 13) * 0xC2B2AE35;
    return word ^ word >> 16;
}

// Random word of a row of weights. `any_head` counts heads through the batch.
__device__ __forceinline__ uint32_t dropout_row(const DropoutParams& dropout, int any_head, int query_token) {
    const uint64_t seed = uint64_t(__ldg(dropout.seed));
    uint32_t word = mix_bits(uint32_t(seed) + kKeyStep);
    word = mix_bits(word ^ uint32_t(seed >> 32));
    return mix_bits(mix_bits(word ^ uint32_t(any_head)) ^ uint32_t(query_token));
}

__device__ __forceinline__ bool is_kept(const DropoutParams& dropout, uint32_t row, int key_token) {
    return mix_bits(row + uint32_t(key_token) * kKeyStep) >> 8 >= dropout.threshold;
}

// Drops of a thread's accumulators, two rows of queries with `rows` as their random words, those of dropped keys. The
// first column is the key in slot `first_slot` of its block.
template <int kCount>
__device__ __forceinline__ void drop_keys(float (&values)[kCount], const DropoutParams& dropout, const uint32_t (&rows)[2],
                                          const BlockPlace& keys, int first_slot) {
    first_slot += 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kCount / 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int key = keys.token(first_slot + 8 * i + j % 2);
            values[4 * i + j] = is_kept(dropout, rows[j / 2], key) ? values[4 * i + j] * dropout.inverse_keep : 0.0f;
        }
    }
}

}  // namespace sparse_attn
