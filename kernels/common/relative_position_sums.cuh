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
        for (int i = threadIdx.x; i < 2 * kColumns * 8; i += blockDim.x) {
            const int half = i / (kColumns * 8), column = i / 8 % kColumns, group = i % 8;  // of 8 keys
            union {
                uint4 all;
                T keys[8];
            } ones;
            const bool is_row = column < kBiasTileHeight, is_there = group / 2 + 4 * half == column;
#pragma unroll
            for (int key = 0; key < 8; key++) {
                const bool is_one = is_row ? is_there : group % 2 * 8 + key == column - kBiasTileHeight;
                ones.keys[key] = T(is_one ? 1.0f : 0.0f);
            }
            *reinterpret_cast<uint4*>(&tiles[half][column * 128 + ((group ^ column % 8) << 4)]) = ones.all;
        }
    }
};

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
    __device__ __forceinline__ void clear_rows() { rows_[threadIdx.x] = {0.0f, 0.0f, 0.0f, 0.0f}; }

    // `seen` has a bit for each of the first columns of tiles; only others must be set to zero before they are added to.
    __device__ __forceinline__ void clear_columns(const BackwardParams& params) {
        for (int column = kSeenColumns; column < params.key_grid.tile_columns; column++) {
#pragma unroll
            for (int i = 0; i < 2; i++) *vector(column, i) = {0.0f, 0.0f, 0.0f, 0.0f};
        }
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
    __device__ __forceinline__ void take(const float (&values)[12], int tile_column, uint32_t& seen) {
        rows_[threadIdx.x] = {values[0], values[1], values[2], values[3]};
        const uint32_t bit = tile_column < kSeenColumns ? 1u << tile_column : 0;
        const bool is_new = bit & ~seen;
        seen |= bit;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 sums = {values[4 * i + 4], values[4 * i + 5], values[4 * i + 6], values[4 * i + 7]};
            if (is_new) {
                __stcg(vector(tile_column, i), sums);
            } else {
                asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(vector(tile_column, i)),
                             "f"(sums.x), "f"(sums.y), "f"(sums.z), "f"(sums.w)
                             : "memory");
            }
        }
    }

    // The next keys are in row `tile_row` of tiles; those before were in row `last`, which becomes it.
    __device__ __forceinline__ void enter_row(const BackwardParams& params, int tile_row, int& last) {
        if (tile_row == last) return;
        const Target target(params, params.grad_rel_h, query_block_, params.key_grid.height);
        if (last >= 0) write_rows(target, last);
        rows_[threadIdx.x] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (last++; last < tile_row; last++) write_rows(target, last);
    }

    __device__ __forceinline__ void end(const BackwardParams& params, int last, uint32_t seen) {
        const GridParams& grid = params.key_grid;
        const Target target(params, params.grad_rel_w, query_block_, grid.width);
        constexpr int kTogether = 4;  // tiles whose sums are read before any is written
        for (int first = 0; first < grid.tile_columns; first += kTogether) {
            float4 sums[kTogether][2] = {};
#pragma unroll
            for (int j = 0; j < kTogether; j++) {
                const int column = first + j;
                if (column >= grid.tile_columns || !(column >= kSeenColumns || seen >> column & 1)) continue;
#pragma unroll
                for (int i = 0; i < 2; i++) sums[j][i] = __ldcg(vector(column, i));
            }
#pragma unroll
            for (int j = 0; j < kTogether; j++) {
                const int column = first + j;
                if (column >= grid.tile_columns) break;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    target.write(column * kBiasTileWidth + 8 * i, sums[j][i]);
                    // What was read need not go to memory.
                    __syncwarp();
                    if (threadIdx.x % 8 == 0) asm volatile("discard.global.L2 [%0], 128;" ::"l"(vector(column, i)) : "memory");
                }
            }
        }
        enter_row(params, (grid.height + kBiasTileHeight - 1) / kBiasTileHeight, last);
    }

  private:
    static constexpr int kSeenColumns = 32;
    static constexpr int kVectors = 2 * kThreads;  // float4 per tile
    static_assert(4 * kVectors == kBlockTokens * kBiasTileWidth, "a sum for each query and column of a tile");

    // This thread's sums of a column of tiles, in two vectors.
    __device__ __forceinline__ float4* vector(int tile_column, int i) const {
        return workspace_ + tile_column * kVectors + i * kThreads + threadIdx.x;
    }

    // Where the gradients of this thread's two queries go, those of queries that do not exist nowhere.
    struct Target {
        T* rows[2];
        int length;

        __device__ __forceinline__ Target(const BackwardParams& params, void* gradient, BlockCode query_block, int length)
            : length(length) {
            const GridParams& grid = params.query_grid;
            const BlockPlace queries(grid, query_block);
            const int64_t tokens = grid.prefix + grid.height * grid.width + grid.suffix;
            const int64_t first_token = (int64_t(blockIdx.z) * params.query_heads + blockIdx.y) * tokens;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int slot = query_row_of_thread() + 8 * i;
                T* const row = static_cast<T*>(gradient) + (first_token + queries.token(slot)) * length;
                rows[i] = queries.exists(slot) ? row + 2 * (threadIdx.x % 4) : nullptr;
            }
        }

        // Two values for each query: of the quad's eight columns from `first` on, as far as they exist.
        __device__ __forceinline__ void write(int first, const float4& values) const {
            const int left = length - first - 2 * (threadIdx.x % 4);
            if (left <= 0) return;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (rows[i] == nullptr) continue;
                const float x = i == 0 ? values.x : values.z, y = i == 0 ? values.y : values.w;
                if (length % 2 == 0) {
                    *reinterpret_cast<uint32_t*>(rows[i] + first) = pack<T>(x, y);
                } else {
                    rows[i][first] = T(x);
                    if (left > 1) rows[i][first + 1] = T(y);
                }
            }
        }
    };

    __device__ __forceinline__ void write_rows(const Target& target, int tile_row) const {
        target.write(tile_row * kBiasTileHeight, rows_[threadIdx.x]);
    }

    float4 rows_[kThreads];
    float4* workspace_;
    BlockCode query_block_;
};

}  // namespace sparse_attn
