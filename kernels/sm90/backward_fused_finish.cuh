// Turns sums of dQ into gradients while the fused kernel computes others, by two of its warps that have nothing else to do.
//
// Heads are computed one after the other. One warp announces each block of keys whose thread block has added all of its
// dQ; another converts half blocks of queries of heads all of whose keys have been announced, whose sums then are likely
// still in the cache. What is not converted when the last block of keys has been handed out is left to the kernel that
// follows, which is faster. No thread block waits for another: what is announced is only waited for by the warp that
// converts, which gives up.
#pragma once

#include "../common/half_block.cuh"
#include "../common/query_sums.cuh"
#include "../common/ring.cuh"
#include "../common/tma.cuh"
#include "backward_fused_work.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim>
struct QuerySumsToGradients {
    static constexpr int kGroups = kHeadDim / 8;  // of columns
    static constexpr int kPieces = 4;             // on their way at a time
    static_assert(kGroups >= kPieces, "the first pieces are all asked for at once");

    struct Tiles {
        alignas(1024) unsigned char gradients[kHalfBlockTokens * 128];  // 64 columns
        alignas(16) float4 sums[kPieces][128];                          // a group of columns
    };
    struct Barriers {
        uint64_t sums_full[kPieces];
    };

    static __device__ __forceinline__ void init(Barriers& barriers) {
        for (int i = 0; i < kPieces; i++) barrier_init(&barriers.sums_full[i], 1);
    }

    // Called by one warp. Each thread block has half blocks of its own.
    static __device__ __forceinline__ void run(const BackwardParams& params, Tiles& tiles, Barriers& barriers) {
        const GridParams& grid = params.query_grid;
        const int per_head = 2 * grid.num_blocks, count = per_head * params.query_heads * params.batch;
        Ring<kPieces> ring;
        for (int half_block = blockIdx.x; half_block < count; half_block += gridDim.x) {
            const int any_head = half_block / per_head;
            if (!await_head(params, any_head / params.heads_per_key_head)) break;
            const int in_head = half_block - any_head * per_head, batch = any_head / params.query_heads;
            const BlockCode block = warp_uniform(code_of_block(grid, in_head / 2));
            TileCoordinates at = half_block_at(grid, block, in_head % 2, any_head - batch * params.query_heads, batch);
            with_map(params.grad_query, block,
                     [&](const CUtensorMap* map) { convert(params, tiles, barriers, ring, half_block, map, at); });
            if (threadIdx.x % 32 == 0) params.finished[half_block] = 1;
        }
        if (threadIdx.x % 32 == 0) tma_store_wait_read();
    }

  private:
    // Until all keys of a head have been announced; false if there will be a better time for what is left.
    static __device__ __forceinline__ bool await_head(const BackwardParams& params, int key_head) {
        while (true) {
            const int taken = *static_cast<volatile int*>(params.blocks_taken);
            const int announced = *static_cast<volatile int*>(params.key_blocks_added + key_head);
            if (warp_uniform(taken) + int(gridDim.x) >= FusedWork::count(params)) return false;
            if (warp_uniform(announced) == params.key_grid.num_blocks) break;
            __nanosleep(4000);
        }
        // What others have added is now read by copies.
        asm volatile("fence.acq_rel.gpu;\n fence.proxy.async.global;" ::: "memory");
        return true;
    }

    static __device__ __forceinline__ void convert(const BackwardParams& params, Tiles& tiles, Barriers& barriers,
                                                   Ring<kPieces>& ring, int half_block, const CUtensorMap* map,
                                                   TileCoordinates& at) {
        const int lane = threadIdx.x % 32;
        const float* const sums = params.grad_query_sums + int64_t(half_block) * (kHalfBlockTokens * kHeadDim);
        const auto fetch = [&](int group, int place) {
            barrier_arrive_expect(&barriers.sums_full[place], sizeof(tiles.sums[0]));
            bulk_load(tiles.sums[place], sums + group * 512, sizeof(tiles.sums[0]), &barriers.sums_full[place]);
        };
        {
            Ring<kPieces> first = ring;
            for (int group = 0; group < kPieces; group++, first.advance()) fetch(group, first.place);
        }
        const uint32_t row = shared_address(tiles.gradients) + lane / 4 * 128 + lane % 4 * 4;
#pragma unroll 1
        for (int group = 0; group < kGroups; group++, ring.advance()) {
            if (group % 8 == 0) {
                if (lane == 0) tma_store_wait_read();
                __syncwarp();
            }
            barrier_wait(&barriers.sums_full[ring.place], ring.parity);
            const uint32_t to = row + ((group % 8 ^ lane / 4) << 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 four = tiles.sums[ring.place][32 * i + lane];
                store_shared(to + i * 2048, pack<T>(four.x * params.scale, four.y * params.scale));
                store_shared(to + i * 2048 + 1024, pack<T>(four.z * params.scale, four.w * params.scale));
            }
            __syncwarp();
            if (group + kPieces < kGroups) fetch(group + kPieces, ring.place);
            if (group % 8 == 7 || group == kGroups - 1) {
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) {
                    at.column = group / 8 * 64;
                    tma_store(map, tiles.gradients, at);
                    tma_store_commit();
                }
            }
        }
    }

    static __device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
    }
};

}  // namespace sparse_attn
