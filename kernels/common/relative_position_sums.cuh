// Gradients of the relative position: sums of the logits' gradients dS over the keys of one row, and of one column, of
// the key grid.
//
// Summing is a product with a constant matrix of ones and zeros, which takes dS from the registers that hold it for
// dQ += dS K anyway: 24 more columns, 8 rows and 16 columns of the key tile. Sums of rows are kept in shared memory while
// the key tiles are of one row of tiles, which the ascending order of the lists makes one stretch. Those of columns are
// added to a workspace. Both lie there in the order in which threads hold them, so that each thread meets its own sums
// alone: no atomicity is needed, and the result is the same in every run.
#pragma once

#include "initial_logits.cuh"
#include "wgmma.cuh"

namespace sparse_attn {

// Ones where a key of half a tile (64 keys, depth) belongs to a row or column of the tile (24 columns of the product).
template <typename T>
struct KeyPlaces {
    static constexpr int kColumns = kBiasTileHeight + kBiasTileWidth, kHalfBytes = kColumns * 128;
    alignas(1024) unsigned char tiles[2][kHalfBytes];  // of either half

    __device__ __forceinline__ void fill() {
        for (int i = threadIdx.x; i < 2 * kColumns * 64; i += blockDim.x) {
            const int half = i / (kColumns * 64), column = i / 64 % kColumns, key = i % 64;
            const bool is_there = column < kBiasTileHeight ? key / kBiasTileWidth + 4 * half == column
                                                           : key % kBiasTileWidth == column - kBiasTileHeight;
            const int offset = column * 128 + ((key / 8 ^ column % 8) << 4) + key % 8 * 2;
            *reinterpret_cast<T*>(&tiles[half][offset]) = T(is_there ? 1.0f : 0.0f);
        }
    }
};

// Sums += dS places, dS from registers.
template <typename T>
__device__ __forceinline__ void wgmma_sums(float (&d)[12], const uint32_t (&a)[4], uint64_t b) {
#define WGMMA_SUMS(type) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n24k16.f32." type "." type \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, %16, 1, 1, 1, 0;" \
                 : FLOATS_8(d, 0), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        WGMMA_SUMS("bf16");
    } else {
        WGMMA_SUMS("f16");
    }
#undef WGMMA_SUMS
}

// Of one block of queries. Lies in shared memory, as no register can be spared between the products.
template <typename T>
class RelativePositionSums {
  public:
    static constexpr int kThreads = 256;

    // One thread calls it.
    __device__ __forceinline__ void place_at(const BackwardParams& params, int block, BlockCode code) {
        const int64_t any_head = int64_t(blockIdx.z) * params.query_heads + blockIdx.y;
        const int64_t any_block = any_head * params.query_grid.num_blocks + block;
        query_block_ = code;
        workspace_ = reinterpret_cast<float4*>(params.rel_w_sums) + any_block * params.key_grid.tile_columns * kVectors;
    }

    // The calls below are by all threads.
    __device__ __forceinline__ void clear(const BackwardParams& params) {
        rows_[threadIdx.x] = {0.0f, 0.0f, 0.0f, 0.0f};
        float4* const sums = workspace_ + threadIdx.x;
        for (int i = 0; i < 2 * params.key_grid.tile_columns; i++) sums[i * kThreads] = {0.0f, 0.0f, 0.0f, 0.0f};
    }

    // What a product is accumulated onto: rows of the tile, two for each of two queries, then columns, likewise and again.
    __device__ __forceinline__ void begin(float (&values)[12]) const {
        const float4 rows = rows_[threadIdx.x];
        values[0] = rows.x;
        values[1] = rows.y;
        values[2] = rows.z;
        values[3] = rows.w;
#pragma unroll
        for (int i = 4; i < 12; i++) values[i] = 0.0f;
        pin_registers(values);
    }

    // Takes them in after a product with keys in column `tile_column` of tiles.
    __device__ __forceinline__ void take(const float (&values)[12], int tile_column) {
        rows_[threadIdx.x] = {values[0], values[1], values[2], values[3]};
        float4* const sums = workspace_ + tile_column * kVectors + threadIdx.x;
#pragma unroll
        for (int i = 4; i < 12; i += 4) {
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + (i / 4 - 1) * kThreads),
                         "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3])
                         : "memory");
        }
    }

    // The next keys are in row `tile_row` of tiles; those before were in row `last`, which becomes it.
    __device__ __forceinline__ void enter_row(const BackwardParams& params, int tile_row, int& last) {
        if (tile_row == last) return;
        const BlockPlace queries(params.query_grid, query_block_);
        if (last >= 0) write_rows(params, queries, last);
        rows_[threadIdx.x] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (last++; last < tile_row; last++) write_rows(params, queries, last);
    }

    __device__ __forceinline__ void end(const BackwardParams& params, bool has_keys, int last) {
        const GridParams& grid = params.key_grid;
        enter_row(params, (grid.height + kBiasTileHeight - 1) / kBiasTileHeight, last);
        const BlockPlace queries(params.query_grid, query_block_);
        for (int column = 0; column < grid.tile_columns; column++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
                if (has_keys) sums = __ldcg(workspace_ + column * kVectors + i * kThreads + threadIdx.x);
                const int first = column * kBiasTileWidth + 8 * i + 2 * (threadIdx.x % 4);
                write(params, params.grad_rel_w, queries, 0, first, grid.width, sums.x, sums.y);
                write(params, params.grad_rel_w, queries, 8, first, grid.width, sums.z, sums.w);
            }
        }
    }

  private:
    static constexpr int kVectors = 2 * kThreads;  // float4 per tile
    static_assert(4 * kVectors == kBlockTokens * kBiasTileWidth, "a sum for each query and column of a tile");

    __device__ __forceinline__ void write_rows(const BackwardParams& params, const BlockPlace& queries, int tile_row) const {
        const int first = tile_row * kBiasTileHeight + 2 * (threadIdx.x % 4), height = params.key_grid.height;
        const float4 rows = rows_[threadIdx.x];
        write(params, params.grad_rel_h, queries, 0, first, height, rows.x, rows.y);
        write(params, params.grad_rel_h, queries, 8, first, height, rows.z, rows.w);
    }

    // Two neighbouring values, from `first` on, of the query `below` this thread's first, as far as they exist.
    static __device__ __forceinline__ void write(const BackwardParams& params, void* gradient, const BlockPlace& queries,
                                                 int below, int first, int length, float x, float y) {
        const int slot = query_row_of_thread() + below;
        if (!queries.exists(slot) || first >= length) return;
        const GridParams& grid = params.query_grid;
        const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
        const int64_t row = (int64_t(blockIdx.z) * params.query_heads + blockIdx.y) * tokens + queries.token(slot);
        T* const target = static_cast<T*>(gradient) + row * length + first;
        if (length % 2 == 0) {
            *reinterpret_cast<uint32_t*>(target) = pack<T>(x, y);
        } else {
            target[0] = T(x);
            if (first + 1 < length) target[1] = T(y);
        }
    }

    float4 rows_[kThreads];
    float4* workspace_;
    BlockCode query_block_;
};

}  // namespace sparse_attn
