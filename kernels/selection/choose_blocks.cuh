// From features of the parts of blocks to the blocks that attention computes, with their lists: what
// sparse_attn_modules/patterns/choosing.py defines. A thread block takes 8 blocks of queries of one head: products of the
// features on the tensor cores (tf32), a softmax over all parts of the keys, sums per block. Then a warp per row compares
// every block with every other to know what comes before it, and writes the row's list.
#pragma once

#include "../common/overlapping_launch.cuh"
#include "part.cuh"

namespace sparse_attn {

constexpr int kChooseThreads = 256;
constexpr int kChooseBlocks = kChooseThreads / 32;   // of queries, per thread block: a warp each
constexpr int kChooseRows = kChooseBlocks * kParts;  // of the product: two times 16, by four warps each
constexpr int kCertain = 0x7f800000;                 // more than the bits of any mass

// Floats from one row of queries to the next in shared memory, so that 8 rows meet no bank twice.
__host__ __device__ inline int query_row_stride(int features) { return features + ((8 - features) & 31); }

// Floats of scratch per block of queries: [kParts][K], or two rows of whole warps.
__host__ __device__ inline int block_room(int columns) { return max(kParts * columns, 2 * ((columns + 31) / 32 * 32)) + 4; }

inline size_t choose_shared_bytes(const ChooseParams& params) {
    const int room = block_room(params.key_grid.num_blocks);
    return sizeof(float) * (kChooseRows * query_row_stride(params.features) + kChooseBlocks * room);
}

__device__ __forceinline__ uint32_t as_tf32(float value) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Base-2 log-sum-exp of the logits to each key block, for 16 rows of queries: `sums` [16 / kParts] with [kParts][K] in
// each room. The keys are shared out among kChooseThreads / 64 warps, of which this is number `warp`.
__device__ __forceinline__ void score(const ChooseParams& params, const float* keys, const float* queries, float* sums,
                                      int room, int warp) {
    constexpr int kTiles = 4, kWarps = kChooseThreads / 64;  // of 8 parts of keys at once; that share the keys
    constexpr float kLog2e = 1.4426950408889634f;
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    const int parts = params.key_grid.num_blocks * kParts, stride = query_row_stride(params.features);
    for (int first = warp * kTiles * 8; first < parts; first += kWarps * kTiles * 8) {
        float logits[kTiles][4] = {};
#pragma unroll 3
        for (int step = 0; step < params.features; step += 8) {
            // The products do not mind in which order features come, so that each lane reads two that are neighbours.
            const float2 low = *reinterpret_cast<const float2*>(queries + row * stride + step + 2 * column);
            const float2 high = *reinterpret_cast<const float2*>(queries + (row + 8) * stride + step + 2 * column);
            const uint32_t a[4] = {as_tf32(low.x), as_tf32(high.x), as_tf32(low.y), as_tf32(high.y)};
#pragma unroll
            for (int tile = 0; tile < kTiles; tile++) {
                const int part = min(first + tile * 8 + row, parts - 1);
                const float2 b = *reinterpret_cast<const float2*>(keys + part * params.features + step + 2 * column);
                mma_tf32(logits[tile], a, as_tf32(b.x), as_tf32(b.y));
            }
        }
        static_assert(kParts == 4, "two lanes hold the logits of a block");
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
            const int block = (first + tile * 8) / kParts + column / 2;
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                const float x = logits[tile][2 * upper] * kLog2e, y = logits[tile][2 * upper + 1] * kLog2e;
                float most = fmaxf(x, y);
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
                float sum = exp2f(x - most) + exp2f(y - most);
                sum += __shfl_xor_sync(0xffffffff, sum, 1);
                if (column % 2 == 0 && block < params.key_grid.num_blocks) {
                    const int query = row + 8 * upper;
                    sums[query / kParts * room + query % kParts * params.key_grid.num_blocks + block] = most + log2f(sum);
                }
            }
        }
    }
}

// Along one side of the image, the key tile whose centre is nearest to that of a query tile.
__device__ inline int nearest_tile(int index, int query_size, int query_tile, int key_size, int key_tile) {
    const auto centre = [](int i, int size, int tile) {
        return (double(i * tile) + min(i * tile + tile, size)) / (2.0 * size);
    };
    const double wanted = centre(index, query_size, query_tile);
    int best = 0;
    double least = INFINITY;
    for (int i = 0; i * key_tile < key_size; i++) {
        const double distance = fabs(wanted - centre(i, key_size, key_tile));
        if (distance < least) {
            least = distance;
            best = i;
        }
    }
    return best;
}

// The key block that lies over a query tile.
__device__ __forceinline__ int own_block(const ChooseParams& params, int tile) {
    const GridParams &queries = params.query_grid, &keys = params.key_grid;
    if (params.same_grids) return keys.prefix_blocks + tile;
    const int row = tile / queries.tile_columns, column = tile % queries.tile_columns;
    const int y = nearest_tile(row, queries.height, queries.tile_height, keys.height, keys.tile_height);
    const int x = nearest_tile(column, queries.width, queries.tile_width, keys.width, keys.tile_width);
    return keys.prefix_blocks + y * keys.tile_columns + x;
}

// The value of each lane's columns, lane + 32 i, where they exist.
template <int kColumns, typename Value>
__device__ __forceinline__ void each_column(int columns, const Value& value) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const int j = threadIdx.x % 32 + 32 * i;
        if (j < columns) value(i, j);
    }
}

// The mass of each key block, from the log-sum-exps of the block's parts, the kParts rows of `sums`.
template <int kColumns>
__device__ __forceinline__ void mass_of_block(const ChooseParams& params, int block, const float* sums,
                                              float (&mass)[kColumns]) {
    const int columns = params.key_grid.num_blocks;
    float most[kParts], total[kParts], share[kParts], tokens = 0;
#pragma unroll
    for (int row = 0; row < kParts; row++) {
        share[row] = float(part_of_block(params.query_grid, params.query_cut, block, row).count());
        tokens += share[row];
        most[row] = -INFINITY;
        total[row] = 0;
        each_column<kColumns>(columns, [&](int, int j) { most[row] = fmaxf(most[row], sums[row * columns + j]); });
    }
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int row = 0; row < kParts; row++) most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffff, most[row], step));
    }
#pragma unroll
    for (int row = 0; row < kParts; row++) {
        each_column<kColumns>(columns, [&](int, int j) { total[row] += exp2f(sums[row * columns + j] - most[row]); });
    }
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int row = 0; row < kParts; row++) total[row] += __shfl_xor_sync(0xffffffff, total[row], step);
    }
#pragma unroll
    for (int i = 0; i < kColumns; i++) mass[i] = 0;
#pragma unroll
    for (int row = 0; row < kParts; row++) {
        const float factor = __fdividef(share[row], tokens * total[row]);
        each_column<kColumns>(columns, [&](int i, int j) {
            mass[i] = fmaf(exp2f(sums[row * columns + j] - most[row]), factor, mass[i]);
        });
    }
}

// Which blocks of a row come before which: the greater rank, and of equal ones the first. `before` counts them, or sums
// up their mass, for each lane's columns. `ranks` and `masses` are rows of shared memory, filled up to whole warps.
template <int kColumns, bool kCount>
__device__ __forceinline__ void find_before(const int* ranks, const float* masses, const int (&rank)[kColumns],
                                            float (&before)[kColumns]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kColumns; i++) before[i] = 0;
    for (int chunk = 0; chunk < kColumns; chunk++) {
        int least[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; i++) least[i] = rank[i] - (chunk < i ? 1 : 0);
#pragma unroll 2
        for (int first = 0; first < 32; first += 4) {
            const int4 others = *reinterpret_cast<const int4*>(ranks + chunk * 32 + first);
            const int other[4] = {others.x, others.y, others.z, others.w};
            float weight[4] = {1, 1, 1, 1};
            if constexpr (!kCount) {
                const float4 loaded = *reinterpret_cast<const float4*>(masses + chunk * 32 + first);
                weight[0] = loaded.x, weight[1] = loaded.y, weight[2] = loaded.z, weight[3] = loaded.w;
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int i = 0; i < kColumns; i++) before[i] += other[k] > least[i] ? weight[k] : 0.0f;
            }
        }
    }
    // Among equals of the lane's own chunk the first lanes come first.
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const unsigned equal = __match_any_sync(0xffffffff, rank[i]) & ((1u << lane) - 1);
        before[i] += float(__popc(equal)) * (kCount ? 1.0f : masses[lane + 32 * i]);
    }
}

// Chooses the blocks of one row and writes its lists. Whole warps; `sums` are the log-sum-exps of the row's parts, whose
// room serves as scratch.
template <int kColumns>
__device__ __forceinline__ void choose_row(const ChooseParams& params, int block, int64_t list, float* sums) {
    const GridParams &query_grid = params.query_grid, &key_grid = params.key_grid;
    const int lane = threadIdx.x % 32, columns = key_grid.num_blocks, tile = block - query_grid.prefix_blocks;
    const bool is_tile = tile >= 0 && tile < query_grid.tile_blocks;
    const int own = is_tile ? own_block(params, tile) : 0;

    float mass[kColumns], before[kColumns], total = 0;
    int rank[kColumns];
    mass_of_block<kColumns>(params, block, sums, mass);
    __syncwarp();
    int* const ranks = reinterpret_cast<int*>(sums);
    float* const masses = sums + 32 * kColumns;
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const int j = lane + 32 * i;
        const bool is_extra = j < key_grid.prefix_blocks || j >= key_grid.prefix_blocks + key_grid.tile_blocks;
        if (!(mass[i] >= 0)) mass[i] = 0;  // not a number: least
        // The bits of numbers that are not negative sort as the numbers do.
        rank[i] = !is_tile || is_extra || j == own ? kCertain : min(__float_as_int(mass[i]), kCertain - 1);
        if (j >= columns) rank[i] = -1;
        total += mass[i];
        ranks[j] = rank[i];
        masses[j] = mass[i];
    }
    __syncwarp();
    float limit = float(params.count);
    if (params.count > 0) {
        find_before<kColumns, true>(ranks, masses, rank, before);
    } else {
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffff, total, step);
        limit = params.mass * total;
        find_before<kColumns, false>(ranks, masses, rank, before);
    }

    unsigned takes[kColumns];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const bool is_taken = rank[i] == kCertain || (rank[i] >= 0 && before[i] < limit);
        takes[i] = __ballot_sync(0xffffffff, is_taken);
        count += __popc(takes[i]);
    }
    int taken = 0;
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const int j = lane + 32 * i, taken_before = taken + __popc(takes[i] & ((1u << lane) - 1));
        const bool is_taken = takes[i] >> lane & 1;
        if (j < columns) {
            params.blocks[list * columns + j] = is_taken;
            params.key_indices[list * columns + (is_taken ? taken_before : count + j - taken_before)] = j;
        }
        taken += __popc(takes[i]);
    }
    if (lane == 0) {
        params.key_counts[list] = count;
        // Rows of extra tokens are the longest; the others are equal. Where counts vary, order_rows comes after.
        int position = block;
        if (params.count > 0 && params.count < columns) {
            const int extra = query_grid.num_blocks - query_grid.tile_blocks;
            if (is_tile) position = extra + tile;
            if (tile >= query_grid.tile_blocks) position = block - query_grid.tile_blocks;
        }
        params.row_order[list - block + position] = block;
    }
}

// kColumns: of a row, per lane.
template <int kColumns>
__global__ void __launch_bounds__(kChooseThreads) choose_blocks(const __grid_constant__ ChooseParams params) {
    extern __shared__ __align__(16) float shared[];
    const int warp = threadIdx.x / 32, head = blockIdx.y, batch = blockIdx.z;
    const int first_block = blockIdx.x * kChooseBlocks, stride = query_row_stride(params.features);
    const int rows = params.query_grid.num_blocks, columns = params.key_grid.num_blocks;
    float* const sums = shared + kChooseRows * stride;  // for each block of queries [kParts][K], with room to spare
    const int room = block_room(columns);

    const int64_t place = int64_t(batch) * params.heads + head;
    const int64_t key_place = place / params.heads_per_key_head;  // the key heads of a batch entry lie together, too
    const float* queries = params.queries + (place * rows + first_block) * kParts * params.features;
    const float* keys = params.keys + key_place * columns * kParts * params.features;
    const int parts = min(kChooseBlocks, rows - first_block) * kParts, words = params.features / 4;
    await_kernel_before();
    for (int row = warp; row < kChooseRows; row += kChooseThreads / 32) {
        for (int word = threadIdx.x % 32; word < words; word += 32) {
            float4 loaded = make_float4(0, 0, 0, 0);
            if (row < parts) loaded = *reinterpret_cast<const float4*>(queries + row * params.features + word * 4);
            *reinterpret_cast<float4*>(shared + row * stride + word * 4) = loaded;
        }
    }
    __syncthreads();
    score(params, keys, shared + warp % 2 * 16 * stride, sums + warp % 2 * (16 / kParts) * room, room, warp / 2);
    __syncthreads();
    const int block = first_block + warp;
    if (block < rows) choose_row<kColumns>(params, block, place * rows + block, sums + warp * room);
}

// Query blocks by their number of keys, the most first, of equal ones the first first. A warp per head.
__global__ void order_rows(const int32_t* counts, int32_t* order, int64_t heads, int rows) {
    const int64_t head = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= heads) return;
    counts += head * rows;
    for (int i = threadIdx.x % 32; i < rows; i += 32) {
        const int count = counts[i];
        int rank = 0;
        for (int j = 0; j < rows; j++) rank += counts[j] > count || (counts[j] == count && j < i);
        order[head * rows + rank] = i;
    }
}

// The query blocks of each key block: counts [.., K], indices [.., K, Q]. A warp per key block.
__global__ void list_queries(const uint8_t* blocks, int32_t* counts, int32_t* indices, int64_t heads, int rows,
                             int columns) {
    const int64_t list = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (list >= heads * columns) return;
    const int lane = threadIdx.x % 32, column = int(list % columns);
    const uint8_t* head_blocks = blocks + list / columns * rows * columns + column;
    int count = 0;
    for (int i = lane; i < rows; i += 32) count += head_blocks[int64_t(i) * columns] != 0;
    count = __reduce_add_sync(0xffffffff, count);
    const uint32_t before = (1u << lane) - 1;
    int taken = 0, left = count;
    for (int first = 0; first < rows; first += 32) {
        const int i = first + lane;
        const bool is_taken = i < rows && head_blocks[int64_t(i) * columns] != 0;
        const uint32_t takes = __ballot_sync(0xffffffff, is_taken);
        const uint32_t leaves = __ballot_sync(0xffffffff, i < rows && !is_taken);
        if (i < rows) indices[list * rows + (is_taken ? taken + __popc(takes & before) : left + __popc(leaves & before))] = i;
        taken += __popc(takes);
        left += __popc(leaves);
    }
    if (lane == 0) counts[list] = count;
}

}  // namespace sparse_attn
