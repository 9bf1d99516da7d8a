// How the kernels that find statistics of queries do so: see statistics.cuh for what they are.
#pragma once

#include "statistics.cuh"

namespace sparse_attn {

// What is known of a query before anything is computed: its log-sum-exp, -inf without a key, and the gradient of that.
struct KnownStatistics {
    float lse, grad_lse;

    static __device__ __forceinline__ KnownStatistics of_slot(const BackwardParams& params, const BlockPlace& place, int slot,
                                                              int head, int batch) {
        const GridParams& grid = params.query_grid;
        const int64_t any_head = int64_t(batch) * params.query_heads + head;
        const int64_t first_token = any_head * (grid.prefix + grid.height * grid.width + grid.suffix);
        KnownStatistics known{-INFINITY, 0.0f};
        if (place.exists(slot)) {
            const int64_t token = first_token + place.token(slot);
            known.lse = __ldg(&params.lse[token]);
            if (params.grad_lse != nullptr) known.grad_lse = __ldg(&params.grad_lse[token]);
        }
        return known;
    }

    __device__ __forceinline__ float offset() const { return lse == -INFINITY ? INFINITY : lse * kLog2E; }
    __device__ __forceinline__ float delta(float product) const { return lse == -INFINITY ? 0.0f : product - grad_lse; }
};

template <typename T>
__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = unpack<T>(xs[i]), b = unpack<T>(ys[i]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    }
    return sum;
}

// Row `slot` of one 128-byte-swizzled tile times that of another; the quad's lanes share the work.
template <typename T, int kChunks>
__device__ __forceinline__ float dot_of_rows(const unsigned char* x, const unsigned char* y, int chunk_bytes, int slot) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kChunks; i++) {
        const int column_group = i % 2 * 4 + threadIdx.x % 4;
        const int at = i / 2 * chunk_bytes + slot * 128 + ((column_group ^ slot % 8) << 4);
        sum += dot<T>(*reinterpret_cast<const uint4*>(x + at), *reinterpret_cast<const uint4*>(y + at));
    }
    return quad_sum(sum);
}

// Of this thread's two queries, for the kernel of keys and values. `block` is in list order.
__device__ __forceinline__ void write_statistics(const BackwardParams& params, int block, int head, int batch,
                                                 const float (&offset)[2], const float (&delta)[2]) {
    const int64_t any_head = int64_t(batch) * params.query_heads + head;
    float* const statistics = params.statistics + (any_head * params.query_grid.num_blocks + block) * (2 * kBlockTokens);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int slot = query_row_of_thread() + 8 * i;
        float* const pair = statistics + slot / 2 * 4 + slot % 2;
        if (threadIdx.x % 4 == 0) pair[0] = offset[i];
        if (threadIdx.x % 4 == 1) pair[2] = delta[i];
    }
}

}  // namespace sparse_attn
