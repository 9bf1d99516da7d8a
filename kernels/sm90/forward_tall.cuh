// Forward pass of full attention without a relative position, for head_dim up to 64: three warpgroups share every block of keys.
//
// Where every query attends to every key, the rows that share a thread block need not be a block of the mask. A thread
// block computes 192 queries, three half blocks, with a warpgroup for each: keys are copied a third less often, and
// twelve warps of softmax keep the tensor cores busy. One thread block per multiprocessor stays for many such rows, and a
// producer warp streams keys and values across the borders. Each warpgroup issues Q K^T of the next block of keys and
// P V of this one together, and takes the next softmax while P V still runs.
#pragma once

#include "../common/half_block.cuh"
#include "../common/initial_logits.cuh"
#include "../common/ring.cuh"
#include "../common/softmax.cuh"
#include "../common/wgmma.cuh"
#include "../common/write_output.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kMaskedKeys>
struct TallForward {
    static_assert(kHeadDim <= 64, "one 64-wide chunk per tile; wider heads do not fit in registers");
    static constexpr int kRowGroups = 3;  // warpgroups, of half a block of queries each
    static constexpr int kConsumerWarps = 4 * kRowGroups;
    static constexpr int kThreads = 128 + 32 * kConsumerWarps;
    static constexpr int kStages = 2;
    static constexpr int kTileBytes = kBlockTokens * 128;
    static constexpr int kHalfBytes = kTileBytes / 2;

    struct Storage {
        alignas(1024) unsigned char query[2][kRowGroups][kHalfBytes];  // holds the output at the end
        alignas(1024) unsigned char key[kStages][kTileBytes];
        alignas(1024) unsigned char value[kStages][kTileBytes];
        BlockCode key_block[kStages];
        uint64_t query_full[2], query_free[2];
        uint64_t key_full[kStages], key_free[kStages], value_full[kStages], value_free[kStages];
    };
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    struct Work {
        int half, head, batch;  // the first of the half blocks
        __device__ __forceinline__ Work(const ForwardParams& params, int index) {
            const int rows = rows_per_head(params), any_head = index / rows;
            half = (index - any_head * rows) * kRowGroups;
            batch = any_head / params.query_heads;
            head = any_head - batch * params.query_heads;
        }
    };
    static __host__ __device__ __forceinline__ int rows_per_head(const ForwardParams& params) {
        return (2 * params.query_grid.num_blocks + kRowGroups - 1) / kRowGroups;
    }
    static __host__ __device__ __forceinline__ int work_count(const ForwardParams& params) {
        return rows_per_head(params) * params.query_heads * params.batch;
    }

    // The half block that a warpgroup computes. Past the last one it is a copy of that, which is not written.
    struct Half {
        BlockCode block;
        int index;  // within the block
        __device__ __forceinline__ Half(const ForwardParams& params, const Work& work, int group) {
            const int half = min(work.half + group, 2 * params.query_grid.num_blocks - 1);
            block = warp_uniform(code_of_block(params.query_grid, half / 2));
            index = half % 2;
        }
    };

    static __device__ __forceinline__ void load_queries(Storage& storage, const ForwardParams& params, const Work& work,
                                                        const Ring<2>& queries) {
        uint64_t* full = &storage.query_full[queries.place];
        barrier_wait(&storage.query_free[queries.place], queries.parity ^ 1);
        barrier_arrive_expect(full, kRowGroups * kHalfBytes);
#pragma unroll
        for (int group = 0; group < kRowGroups; group++) {
            const Half half(params, work, group);
            const TileCoordinates at = half_block_at(params.query_grid, half.block, half.index, work.head, work.batch);
            with_map(params.query, half.block,
                     [&](const CUtensorMap* map) { tma_load(storage.query[queries.place][group], map, at, full); });
        }
    }

    static __device__ __forceinline__ void produce(const ForwardParams& params, Storage& storage) {
        Ring<2> queries;
        Ring<kStages> stages;
        for (int index = blockIdx.x; index < work_count(params); index += gridDim.x) {
            const Work work(params, index);
            const int key_head = work.head / params.heads_per_key_head;
            load_queries(storage, params, work, queries);
            queries.advance();
            if constexpr (kMaskedKeys) {
                for_blocks(params, true, [&](BlockCode block) { load_stage(storage, params, work, key_head, block, stages); });
            }
            for_blocks(params, false, [&](BlockCode block) { load_stage(storage, params, work, key_head, block, stages); });
        }
    }

    // Blocks of keys some of which are absent come first, so that the others need not be asked.
    template <typename Load>
    static __device__ __forceinline__ void for_blocks(const ForwardParams& params, bool masked, const Load& load) {
        for (int i = 0; i < params.key_grid.num_blocks; i++) {
            const BlockCode block = warp_uniform(code_of_block(params.key_grid, i));
            if constexpr (kMaskedKeys) {
                if (masked != (params.key_padding != nullptr || !BlockPlace(params.key_grid, block).is_full())) continue;
            }
            load(block);
        }
    }

    static __device__ __forceinline__ void load_stage(Storage& storage, const ForwardParams& params, const Work& work,
                                                      int key_head, BlockCode block, Ring<kStages>& stages) {
        const int stage = stages.place;
        const TileCoordinates at{0, key_head, x_of(params.key_grid, block), y_of(params.key_grid, block), work.batch};
        uint64_t *key_full = &storage.key_full[stage], *value_full = &storage.value_full[stage];
        barrier_wait(&storage.key_free[stage], stages.parity ^ 1);
        if (threadIdx.x % 32 == 0) storage.key_block[stage] = block;
        __syncwarp();
        barrier_arrive_expect(key_full, kTileBytes);
        with_map(params.key, block, [&](const CUtensorMap* map) { tma_load(storage.key[stage], map, at, key_full); });
        barrier_wait(&storage.value_free[stage], stages.parity ^ 1);
        barrier_arrive_expect(value_full, kTileBytes);
        with_map(params.value, block, [&](const CUtensorMap* map) { tma_load(storage.value[stage], map, at, value_full); });
        stages.advance();
    }

    template <bool kMasked>
    static __device__ __forceinline__ void issue_query_key(float (&logits)[64], int query, int key) {
        pin_registers(logits);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; step++) {
            const uint64_t a = tile_descriptor(query + step * kDepthStepAlongRows);
            const uint64_t b = tile_descriptor(key + step * kDepthStepAlongRows);
            if (step == 0) {
                wgmma_logits<T, kMasked>(logits, a, b);
            } else {
                wgmma_logits<T, true>(logits, a, b);
            }
        }
        wgmma_commit();
    }

    static __device__ __forceinline__ void issue_weights_value(float (&out)[kHeadDim / 2], const uint32_t (&weights)[8][4],
                                                               int value) {
        pin_registers(out);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 8; step++) {
            wgmma_output<T, kHeadDim>(out, weights[step], tile_descriptor(value + step * kDepthStepDownRows));
        }
        wgmma_commit();
    }

    // One arrival per warp, after its products have read the buffer.
    static __device__ __forceinline__ void leave(uint64_t* barrier, int lane) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    }

    template <bool kMasked>
    static __device__ __forceinline__ void begin_logits(const Storage& storage, const ForwardParams& params,
                                                        float (&logits)[64], int stage, int batch) {
        if constexpr (kMasked) {
            const RelativePositionTile<T>* none = nullptr;
            initial_logits<T, false, true>(logits, params, from_lane_0(storage.key_block[stage]), batch, none);
        }
    }

    // Reads through the lane whose arrival frees the buffer, so that the read is ordered before the next write.
    static __device__ __forceinline__ int from_lane_0(const int& value) {
        return warp_uniform(threadIdx.x % 32 == 0 ? value : 0);
    }

    // The first of the two rows of its half block that a thread holds.
    static __device__ __forceinline__ int row_of_thread() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

    static __device__ __forceinline__ void consume(const ForwardParams& params, Storage& storage) {
        const int lane = threadIdx.x % 32;
        const int group = warp_uniform(threadIdx.x / 128), next = group == kRowGroups - 1 ? 0 : group + 1;
        const bool leader = threadIdx.x % 128 == 0;
        if (group == kRowGroups - 1) give_turn(0);
        const int count = params.key_grid.num_blocks;
        Ring<2> queries;
        Ring<kStages> stages;
        int stored_place = -1;  // query buffer that this thread's last copy of output may still read
        const auto release_stored = [&] {
            if (!leader || stored_place < 0) return;
            tma_store_wait_read();
            barrier_arrive(&storage.query_free[stored_place]);
            stored_place = -1;
        };

        for (int index = blockIdx.x; index < work_count(params); index += gridDim.x) {
            const Work work(params, index);
            barrier_wait(&storage.query_full[queries.place], queries.parity);
            unsigned char* rows = storage.query[queries.place][group];
            const int query_tile = tile_along_rows(rows);

            OnlineSoftmax softmax;
            float out[kHeadDim / 2], rescale[2];
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; i++) out[i] = 0.0f;
            float logits[64];
            uint32_t weights[8][4];
            barrier_wait(&storage.key_full[stages.place], stages.parity);
            begin_logits<kMaskedKeys>(storage, params, logits, stages.place, work.batch);
            await_turn(group);
            issue_query_key<kMaskedKeys>(logits, query_tile, tile_along_rows(storage.key[stages.place]));
            give_turn(next);
            wgmma_wait<0>(logits);
            leave(&storage.key_free[stages.place], lane);
            release_stored();
            softmax.raise_maximum(logits, params.scale_log2, rescale);
#pragma unroll
            for (int step = 0; step < 8; step++) {
                softmax.exponentiate(logits, params.scale_log2, step);
                pack_weights<T>(logits, step, weights[step]);
            }

            const auto add_block = [&](auto masked) {
                const Ring<kStages> values = stages;
                const int value_tile = tile_down_rows(storage.value[values.place], kTileBytes);
                stages.advance();
                const int key_tile = tile_along_rows(storage.key[stages.place]);
                barrier_wait(&storage.key_full[stages.place], stages.parity);
                begin_logits<masked>(storage, params, logits, stages.place, work.batch);
                await_turn(group);
                issue_query_key<masked>(logits, query_tile, key_tile);
                barrier_wait(&storage.value_full[values.place], values.parity);
                issue_weights_value(out, weights, value_tile);
                give_turn(next);  // once issued: kept until Q K^T is done, it would cost a third
                wgmma_wait<1>(logits);
                leave(&storage.key_free[stages.place], lane);
                softmax.raise_maximum(logits, params.scale_log2, rescale);
#pragma unroll
                for (int step = 0; step < 8; step++) softmax.exponentiate(logits, params.scale_log2, step);
                wgmma_wait<0>(out);
                leave(&storage.value_free[values.place], lane);
                rescale_rows(out, rescale);
#pragma unroll
                for (int step = 0; step < 8; step++) pack_weights<T>(logits, step, weights[step]);
            };
            const int masked = kMaskedKeys ? params.masked_key_blocks : 0;
            if constexpr (kMaskedKeys) {
                for (int i = 1; i < masked; i++) add_block(std::true_type{});
            }
            for (int i = max(masked, 1); i < count; i++) add_block(std::false_type{});

            barrier_wait(&storage.value_full[stages.place], stages.parity);
            issue_weights_value(out, weights, tile_down_rows(storage.value[stages.place], kTileBytes));
            wgmma_wait<0>(out);
            leave(&storage.value_free[stages.place], lane);
            stages.advance();

            float inverse[2], log_sum[2];
            softmax.add_up_quad();
            softmax.finish(inverse, log_sum);
            const bool exists = work.half + group < 2 * params.query_grid.num_blocks;
            const Half half(params, work, group);
            if (params.lse != nullptr && exists) {
                const int slot = half.index * kHalfBlockTokens + row_of_thread();
                write_log_sum(params, BlockPlace(params.query_grid, half.block), work.head, work.batch, slot, log_sum);
            }
            release_stored();
            warpgroup_sync(group);
            stage_rows<T, kHeadDim>(shared_address(rows), out, inverse);
            fence_async_proxy();
            warpgroup_sync(group);
            if (leader) {
                if (exists) store_rows<kHeadDim>(params, half.block, work.head, work.batch, half.index, rows);
                stored_place = queries.place;
            }
            queries.advance();
        }
        if (leader) tma_store_wait_read();
    }

    static __device__ __forceinline__ void run(const ForwardParams& params, Storage& storage) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; i++) {
                barrier_init(&storage.query_full[i], 1);
                barrier_init(&storage.query_free[i], kRowGroups);  // one per warpgroup
            }
            for (int stage = 0; stage < kStages; stage++) {
                barrier_init(&storage.key_full[stage], 1);
                barrier_init(&storage.key_free[stage], kConsumerWarps);
                barrier_init(&storage.value_full[stage], 1);
                barrier_init(&storage.value_free[stage], kConsumerWarps);
            }
            barrier_init_fence();
        }
        __syncthreads();
        if (threadIdx.x >= 32 * kConsumerWarps) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
            if (threadIdx.x < 32 * (kConsumerWarps + 1)) produce(params, storage);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
            consume(params, storage);
        }
    }
};

template <typename T, int kHeadDim, bool kMaskedKeys>
__global__ void __launch_bounds__(512, 1) forward_tall(const __grid_constant__ ForwardParams params) {
    using Kernel = TallForward<T, kHeadDim, kMaskedKeys>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
