// Writes dK and dV of half a block of keys, which a warpgroup of the fused backward kernel holds in registers.
#pragma once

#include "../common/half_block.cuh"
#include "../common/tma.cuh"
#include "backward_fused_work.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim>
struct KeyGradients {
    static constexpr int kChunks = (kHeadDim + 63) / 64, kChunkBytes = kHalfBlockTokens * 128;

    // The last copies may still read `tile` when this returns.
    static __device__ __forceinline__ void store(const BackwardParams& params, unsigned char* tile, int index, int warpgroup,
                                                 const float (&grad_key)[kHeadDim / 2],
                                                 const float (&grad_value)[kHeadDim / 2]) {
        const FusedWork work(params, index);
        const BlockCode block = warp_uniform(code_of_block(params.key_grid, work.key_block));
        const bool leader = threadIdx.x % 128 == 0;
        const TileCoordinates at = half_block_at(params.key_grid, block, warpgroup, work.head, work.batch);
        if constexpr (kChunks > 1) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; chunk++) {
                store_chunk(params.grad_key, tile, block, at, chunk, warpgroup, leader, grad_key, params.scale);
                store_chunk(params.grad_value, tile, block, at, chunk, warpgroup, leader, grad_value, 1.0f);
            }
        } else {
            stage_half_block<T, kHeadDim>(tile, grad_key, params.scale);
            stage_half_block<T, kHeadDim>(tile + kChunkBytes, grad_value, 1.0f);
            fence_async_proxy();
            warpgroup_sync(warpgroup);
            if (!leader) return;
            with_map(params.grad_key, block, [&](const CUtensorMap* map) { tma_store(map, tile, at); });
            with_map(params.grad_value, block, [&](const CUtensorMap* map) { tma_store(map, tile + kChunkBytes, at); });
            tma_store_commit();
        }
    }

  private:
    // Up to 64 columns, through a tile that has room for no more.
    static __device__ __forceinline__ void store_chunk(const TensorMaps& maps, unsigned char* tile, BlockCode block,
                                                       TileCoordinates at, int chunk, int warpgroup, bool leader,
                                                       const float (&gradient)[kHeadDim / 2], float factor) {
        if (leader) tma_store_wait_read();
        warpgroup_sync(warpgroup);
        constexpr int kLast = kHeadDim - 64;
        if (chunk == 0) {
            stage_half_block<T, 64>(tile, reinterpret_cast<const float(&)[32]>(gradient[0]), factor);
        } else {
            stage_half_block<T, kLast>(tile, reinterpret_cast<const float(&)[kLast / 2]>(gradient[32]), factor);
        }
        fence_async_proxy();
        warpgroup_sync(warpgroup);
        if (!leader) return;
        at.column = 64 * chunk;
        with_map(maps, block, [&](const CUtensorMap* map) { tma_store(map, tile, at); });
        tma_store_commit();
    }
};

}  // namespace sparse_attn
