// Forward pass for head_dim above 64, and with dropout: one thread block per multiprocessor stays for many blocks of
// queries.
//
// A producer warp streams queries, keys and values through shared memory, across the borders between blocks of queries,
// so that the next block's first tiles are there when the last one ends. Two warpgroups of 64 rows compute; each issues
// the products Q K^T of the next key block and P V of this one together, and takes the next block's softmax while P V
// still runs.
#pragma once

#include "../common/dropout.cuh"
#include "../common/initial_logits.cuh"
#include "../common/key_list.cuh"
#include "../common/softmax.cuh"
#include "../common/wgmma.cuh"
#include "../common/write_output.cuh"

namespace sparse_attn {

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
struct PersistentForward {
    static_assert(kHeadDim <= 128, "two 64-wide chunks per tile; wider heads do not fit in shared memory");
    static_assert((kRelativePosition && kMaskedKeys) || !kDropout, "dropout is for the general variant");
    static constexpr int kConsumerWarps = 8;
    static constexpr int kThreads = 128 + 32 * kConsumerWarps;
    static constexpr int kStages = 2;
    // The warpgroups take turns at the tensor cores: each until its Q K^T is done, or, where that takes long, only until
    // it is issued.
    static constexpr bool kKeepsTurn = kHeadDim <= 96;
    static constexpr Sums kSums = kHeadDim <= 96 ? Sums::kTree : Sums::kChain;  // ±1 % either way
    static constexpr int kChunks = (kHeadDim + 63) / 64;
    static constexpr int kChunkBytes = kBlockTokens * 128;
    static constexpr int kTileBytes = kChunks * kChunkBytes;
    static constexpr int kBiasBytes =
        kRelativePosition ? kBlockTokens * (kBiasTileHeight + kBiasTileWidth) * int(sizeof(T)) : 0;

    static constexpr bool kWindows = kMaskedKeys && !kDropout;

    struct NoBias {};
    using Bias = std::conditional_t<kRelativePosition, RelativePositionTile<T>, NoBias>;

    struct Storage {
        alignas(1024) unsigned char query[2][kTileBytes];  // holds the output at the end
        alignas(1024) unsigned char key[kStages][kTileBytes];
        alignas(1024) unsigned char value[kStages][kTileBytes];
        Bias bias[kStages];
        uint64_t query_full[2], query_free[2];
        uint64_t key_full[kStages], key_free[kStages], value_full[kStages], value_free[kStages];
        BlockCode key_block[kStages];
        BlockCode query_block[2];  // of the queries in each buffer
        int key_count[2];
    };
    static_assert(sizeof(Storage) <= 227 * 1024, "a thread block cannot have more shared memory");

    // A running number of uses of a ring of two buffers: which buffer, and the parity its barriers have reached.
    struct Ring {
        unsigned uses = 0;
        __device__ __forceinline__ int slot() const { return uses % 2; }
        __device__ __forceinline__ uint32_t parity() const { return uses / 2 % 2; }
    };
    static_assert(kStages == 2, "Ring counts two buffers");

    static __device__ __forceinline__ bool is_none(const ForwardParams& params, const RowWork& work) {
        return lies_outside<kWindows>(params, code_of_block(params.query_grid, work.rank), work.entry);
    }

    // The loads are called by the whole producer warp.
    static __device__ __forceinline__ void load_tile(unsigned char* tile, const TensorMaps& maps, BlockCode block,
                                                     const TileCoordinates& at, uint64_t* barrier) {
        load_chunks<kChunks>(tile, kChunkBytes, maps, block, at, barrier);
    }

    static __device__ __forceinline__ void load_query(Storage& storage, const ForwardParams& params, Ring ring,
                                                      const RowWork& work, BlockCode block, int key_count) {
        const int slot = ring.slot();
        barrier_wait(&storage.query_free[slot], ring.parity() ^ 1);
        if (threadIdx.x % 32 == 0) {
            storage.query_block[slot] = block;
            storage.key_count[slot] = key_count;
        }
        __syncwarp();
        barrier_arrive_expect(&storage.query_full[slot], key_count > 0 ? kTileBytes : 0);
        if (key_count == 0) return;
        const Origin origin = origin_of<kWindows>(params, work.entry);
        const int x = origin.x + x_of(params.query_grid, block), y = origin.y + y_of(params.query_grid, block);
        load_tile(storage.query[slot], params.query, block, {0, work.head, x, y, origin.batch}, &storage.query_full[slot]);
    }

    static __device__ __forceinline__ void load_stage(Storage& storage, const ForwardParams& params, Ring ring,
                                                      const RowWork& work, int key_head, BlockCode query_block,
                                                      BlockCode key_block) {
        const int stage = ring.slot();
        const Origin origin = origin_of<kWindows>(params, work.entry);
        const int x = x_of(params.key_grid, key_block), y = y_of(params.key_grid, key_block);
        const TileCoordinates at{0, key_head, origin.x + x, origin.y + y, origin.batch};
        const bool has_bias = kRelativePosition && part_of(key_block) == kImage && (!kDropout || params.relative_position);
        uint64_t* key_full = &storage.key_full[stage];
        barrier_wait(&storage.key_free[stage], ring.parity() ^ 1);
        if (threadIdx.x % 32 == 0) storage.key_block[stage] = key_block;
        __syncwarp();
        barrier_arrive_expect(key_full, kTileBytes + (has_bias ? kBiasBytes : 0));
        load_tile(storage.key[stage], params.key, key_block, at, key_full);
        if constexpr (kRelativePosition) {
            if (has_bias) {
                const int query_x = origin.x + x_of(params.query_grid, query_block);
                const int query_y = origin.y + y_of(params.query_grid, query_block);
                with_map(params.rel_h, query_block, [&](const CUtensorMap* map) {
                    tma_load(storage.bias[stage].rel_h, map, {y, work.head, query_x, query_y, origin.batch}, key_full);
                });
                with_map(params.rel_w, query_block, [&](const CUtensorMap* map) {
                    tma_load(storage.bias[stage].rel_w, map, {x, work.head, query_x, query_y, origin.batch}, key_full);
                });
            }
        }
        barrier_wait(&storage.value_free[stage], ring.parity() ^ 1);
        barrier_arrive_expect(&storage.value_full[stage], kTileBytes);
        load_tile(storage.value[stage], params.value, key_block, at, &storage.value_full[stage]);
    }

    static __device__ __forceinline__ void produce(const ForwardParams& params, Storage& storage) {
        Ring queries, stages;
        for (int index = blockIdx.x; index < RowWork::count(params); index += gridDim.x) {
            const RowWork work(params, index);
            if (is_none(params, work)) continue;
            const int key_head = work.head / params.heads_per_key_head;
            const QueryRow row = query_row(params, work.rank, work.head, work.entry);
            const BlockCode query_block = warp_uniform(code_of_block(params.query_grid, row.block));
            KeyList keys;
            keys.open(params, row.list);
            load_query(storage, params, queries, work, query_block, keys.count);
            queries.uses++;
            for (int i = 0; i < keys.count; i++) {
                load_stage(storage, params, stages, work, key_head, query_block, keys.next(params, row.list, i));
                stages.uses++;
            }
        }
    }

    static __device__ __forceinline__ void issue_query_key(float (&logits)[64], int query, int key) {
        pin_registers(logits);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; step++) {
            const int offset = step / 4 * (kChunkBytes >> 4) + step % 4 * kDepthStepAlongRows;
            const uint64_t a = tile_descriptor(query + offset), b = tile_descriptor(key + offset);
            if (step == 0) {
                wgmma_logits<T, kRelativePosition || kMaskedKeys>(logits, a, b);
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
        issue_output<T, kHeadDim>(out, weights, value);
        wgmma_commit();
    }

    static __device__ __forceinline__ void begin_logits(Storage& storage, const ForwardParams& params,
                                                        float (&logits)[64], int stage, int batch, BlockCode& key_block) {
        if constexpr (kRelativePosition || kMaskedKeys) {
            const RelativePositionTile<T>* bias = nullptr;
            if constexpr (kRelativePosition) bias = &storage.bias[stage];
            key_block = from_lane_0(storage.key_block[stage]);
            initial_logits<T, kRelativePosition, kMaskedKeys, kDropout>(logits, params, key_block, batch, bias);
        }
    }

    // Random words of the rows of weights of this thread's two queries.
    static __device__ __forceinline__ void find_dropout_rows(uint32_t (&rows)[2], const ForwardParams& params,
                                                             BlockCode query_block, const RowWork& work) {
        const BlockPlace place(params.query_grid, query_block);
        const int any_head = work.entry * params.query_heads + work.head, slot = query_row_of_thread();
        rows[0] = dropout_row(params.dropout, any_head, place.token(slot));
        rows[1] = dropout_row(params.dropout, any_head, place.token(slot + 8));
    }

    static __device__ __forceinline__ void consume(const ForwardParams& params, Storage& storage) {
        const int warpgroup = warp_uniform(threadIdx.x / 128);
        const bool leader = threadIdx.x % 128 == 0;
        if (warpgroup == 1) give_turn(0);
        Ring queries, stages;
        int stored_slot = -1;  // query buffer that this thread's last copy of output may still read
        const auto release_stored = [&] {
            if (!leader || stored_slot < 0) return;
            tma_store_wait_read();
            barrier_arrive(&storage.query_free[stored_slot]);
            stored_slot = -1;
        };

        for (int index = blockIdx.x; index < RowWork::count(params); index += gridDim.x) {
            const RowWork work(params, index);
            if (is_none(params, work)) continue;
            const int slot = queries.slot();
            barrier_wait(&storage.query_full[slot], queries.parity());
            queries.uses++;
            const int count = from_lane_0(storage.key_count[slot]);
            unsigned char* rows = storage.query[slot] + warpgroup * 64 * 128;
            const int query_tile = tile_along_rows(rows);

            OnlineSoftmax softmax;
            float out[kHeadDim / 2], rescale[2];
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; i++) out[i] = 0.0f;

            if (count > 0) {
                float logits[64];
                uint32_t weights[8][4];
                BlockCode key_block = 0;
                uint32_t dropout_rows[2];
                if constexpr (kDropout) {
                    find_dropout_rows(dropout_rows, params, from_lane_0(storage.query_block[slot]), work);
                }
                // After the sums were taken of all weights.
                const auto drop = [&] {
                    if constexpr (kDropout) {
                        drop_keys(logits, params.dropout, dropout_rows, BlockPlace(params.key_grid, key_block), 0);
                    }
                };
                const int stage = stages.slot();
                barrier_wait(&storage.key_full[stage], stages.parity());
                begin_logits(storage, params, logits, stage, work.entry, key_block);
                await_turn(warpgroup);
                issue_query_key(logits, query_tile, tile_along_rows(storage.key[stage]));
                if (!kKeepsTurn) give_turn(warpgroup ^ 1);
                wgmma_wait<0>(logits);
                if (kKeepsTurn) give_turn(warpgroup ^ 1);
                barrier_leave(&storage.key_free[stage]);
                release_stored();
                softmax.raise_maximum(logits, params.scale_log2, rescale);
#pragma unroll
                for (int step = 0; step < 8; step++) {
                    softmax.template exponentiate<kSums>(logits, params.scale_log2, step);
                }
                drop();
#pragma unroll
                for (int step = 0; step < 8; step++) pack_weights<T>(logits, step, weights[step]);

                for (int i = 1; i < count; i++) {
                    const int value_stage = stages.slot();
                    const uint32_t value_parity = stages.parity();
                    stages.uses++;
                    const int key_stage = stages.slot();
                    barrier_wait(&storage.key_full[key_stage], stages.parity());
                    begin_logits(storage, params, logits, key_stage, work.entry, key_block);
                    await_turn(warpgroup);
                    issue_query_key(logits, query_tile, tile_along_rows(storage.key[key_stage]));
                    barrier_wait(&storage.value_full[value_stage], value_parity);
                    issue_weights_value(out, weights, tile_down_rows(storage.value[value_stage], kChunkBytes));
                    if (!kKeepsTurn) give_turn(warpgroup ^ 1);
                    wgmma_wait<1>(logits);
                    if (kKeepsTurn) give_turn(warpgroup ^ 1);
                    barrier_leave(&storage.key_free[key_stage]);
                    softmax.raise_maximum(logits, params.scale_log2, rescale);
#pragma unroll
                    for (int step = 0; step < 8; step++) {
                        softmax.template exponentiate<kSums>(logits, params.scale_log2, step);
                    }
                    drop();
                    wgmma_wait<0>(out);
                    barrier_leave(&storage.value_free[value_stage]);
                    rescale_rows(out, rescale);
#pragma unroll
                    for (int step = 0; step < 8; step++) pack_weights<T>(logits, step, weights[step]);
                }

                const int value_stage = stages.slot();
                barrier_wait(&storage.value_full[value_stage], stages.parity());
                issue_weights_value(out, weights, tile_down_rows(storage.value[value_stage], kChunkBytes));
                wgmma_wait<0>(out);
                barrier_leave(&storage.value_free[value_stage]);
                stages.uses++;
            }

            float inverse[2], log_sum[2];
            softmax.add_up_quad();
            softmax.finish(inverse, log_sum);
            const BlockCode query_block = from_lane_0(storage.query_block[slot]);
            if (params.lse != nullptr) {
                const BlockPlace place(params.query_grid, query_block);
                write_log_sum(params, place, work.head, work.entry, query_row_of_thread(), log_sum);
            }
            release_stored();
            warpgroup_sync(warpgroup);
            stage_rows<T, kHeadDim>(shared_address(rows), out, inverse);
            fence_async_proxy();
            warpgroup_sync(warpgroup);
            if (leader) {
                store_rows<kHeadDim, kWindows>(params, query_block, work.head, work.entry, warpgroup, rows);
                stored_slot = slot;
            }
        }
        if (leader) tma_store_wait_read();
    }

    static __device__ __forceinline__ void run(const ForwardParams& params, Storage& storage) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; i++) {
                barrier_init(&storage.query_full[i], 1);
                barrier_init(&storage.query_free[i], 2);  // one per consumer warpgroup
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
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            if (threadIdx.x < 32 * (kConsumerWarps + 1)) produce(params, storage);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
            consume(params, storage);
        }
    }
};

template <typename T, int kHeadDim, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
__global__ void __launch_bounds__(384, 1) forward_persistent(const __grid_constant__ ForwardParams params) {
    using Kernel = PersistentForward<T, kHeadDim, kRelativePosition, kMaskedKeys, kDropout>;
    extern __shared__ __align__(1024) unsigned char shared[];
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared));
}

}  // namespace sparse_attn
