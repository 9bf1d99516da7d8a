// What the recomputation of the weights needs to know of each query, in the order in which threads want it.
//
// The weights are P = exp2(scale_log2 q k - L) and the gradients of the logits dS = P (dP - delta), with L the
// log-sum-exp times log2(e) and delta = rowsum(dO O) less the log-sum-exp's own gradient. One kernel writes both, for
// every slot of every block of queries, so that the others fetch half a block by one contiguous copy. Slots without a
// query, and queries without a key, have L = +inf.
#pragma once

#include "../params.h"
#include "half_block.cuh"
#include "mbarrier.cuh"
#include "softmax.cuh"

namespace sparse_attn {

// Of two neighbouring queries: columns of one thread in the transposed products.
struct alignas(16) PairStatistics {
    float2 offset, delta;
};

constexpr float kLog2E = 1.4426950408889634f;

// Fetches those of neighbouring half blocks; called by a whole warp.
template <int kHalfBlocks = 1>
__device__ __forceinline__ void load_statistics(PairStatistics* destination, const BackwardParams& params, int half_block,
                                                int head, int batch, uint64_t* full) {
    constexpr int kPairs = kHalfBlockTokens / 2;
    const int64_t any_head = int64_t(batch) * params.query_heads + head;
    const int64_t first = (any_head * 2 * params.query_grid.num_blocks + half_block) * kPairs;
    bulk_load(destination, reinterpret_cast<const PairStatistics*>(params.statistics) + first,
              kHalfBlocks * kPairs * sizeof(PairStatistics), full);
}

// The scores of column group i, two keys and two queries, become weights.
__device__ __forceinline__ void exponentiate(float (&scores)[32], int i, float scale_log2, float2 offset) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float& x = scores[4 * i + j];
        x = exp2_approximate(fmaf(x, scale_log2, j % 2 ? -offset.y : -offset.x));
    }
}

// Gradients of the logits, of this thread's two queries, as an operand of the product with the keys.
template <typename T, int kSteps>
__device__ __forceinline__ void pack_score_gradients(uint32_t (&packed)[kSteps][4], const float (&weights)[8 * kSteps],
                                                     const float (&grads)[8 * kSteps], const float (&delta)[2]) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; i++) {
        const float x = weights[2 * i] * (grads[2 * i] - delta[i % 2]);
        const float y = weights[2 * i + 1] * (grads[2 * i + 1] - delta[i % 2]);
        packed[i / 4][i % 4] = pack<T>(x, y);
    }
}

// Bias values of one 8 x 16 tile of keys for half a block of queries. A warp's 16 keys are one row of the tile, so that
// rel_h is part of the offset; those of rel_w arrive transposed, as the products have them.
template <typename T>
struct HalfBlockBias {
    static constexpr int kTileHeight = 8, kTileWidth = 16;
    alignas(128) T rel_h[kHalfBlockTokens * kTileHeight];
    alignas(128) T rel_w[kHalfBlockTokens * kTileWidth];

    // Called by a whole warp. `at` is the half block of queries.
    __device__ __forceinline__ void load(const BackwardParams& params, BlockCode query_block, TileCoordinates at,
                                         BlockCode key_block, uint64_t* full) {
        with_map(params.rel_h, query_block, [&](const CUtensorMap* map) {
            at.column = y_of(params.key_grid, key_block);
            tma_load(rel_h, map, at, full);
        });
        with_map(params.rel_w, query_block, [&](const CUtensorMap* map) {
            at.column = x_of(params.key_grid, key_block);
            tma_load(rel_w, map, at, full);
        });
    }

    // For keys that have no place on the grid.
    __device__ __forceinline__ void clear() {
        uint32_t* words = reinterpret_cast<uint32_t*>(this);
        for (int i = threadIdx.x; i < int(sizeof(*this) / 4); i += blockDim.x) words[i] = 0;
    }

    // L - rel_h log2(e) of one row of keys, for the pair of queries whose number is the lane's.
    __device__ __forceinline__ float2 offset_of_lane(const PairStatistics* statistics, int key_row) const {
        const int pair = threadIdx.x % 32;
        const float2 offset = statistics[pair].offset;
        return {fmaf(float(rel_h[2 * pair * kTileHeight + key_row]), -kLog2E, offset.x),
                fmaf(float(rel_h[(2 * pair + 1) * kTileHeight + key_row]), -kLog2E, offset.y)};
    }

    __device__ __forceinline__ void exponentiate(float (&scores)[32], float2 offset_of_lane, float scale_log2) const {
        const int lane = threadIdx.x % 32;
        const uint32_t rows = shared_address(rel_w) + (lane / 16 * 8 + lane % 8) * kTileWidth * 2 + lane / 8 % 2 * 16;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            uint32_t pairs[4];  // of column groups i and i + 1, and for each of them two keys
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                         : "r"(rows + i * 8 * kTileWidth * 2));
            float2 offset;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (j % 2 == 0) {
                    const int source = 4 * (i + j / 2) + lane % 4;
                    offset.x = __shfl_sync(0xffffffff, offset_of_lane.x, source);
                    offset.y = __shfl_sync(0xffffffff, offset_of_lane.y, source);
                }
                const float2 of_column = unpack<T>(pairs[j]);
                float* const score = &scores[4 * (i + j / 2) + 2 * (j % 2)];
                score[0] = exp2_approximate(fmaf(score[0], scale_log2, fmaf(of_column.x, kLog2E, -offset.x)));
                score[1] = exp2_approximate(fmaf(score[1], scale_log2, fmaf(of_column.y, kLog2E, -offset.y)));
            }
        }
    }
};

}  // namespace sparse_attn
