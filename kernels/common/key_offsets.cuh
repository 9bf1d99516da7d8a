// What the exponents of the weights get beside scale q k: the relative position's bias, less the log-sum-exp; and which
// weights are none, as their keys do not exist. Read while the products run, and applied after.
#pragma once

#include "initial_logits.cuh"
#include "statistics.cuh"

namespace sparse_attn {

// For this thread's two queries and kKeys keys, all or half of a block.
template <typename T, int kKeys, bool kRelativePosition, bool kMaskedKeys, bool kDropout>
class KeyOffsets {
  public:
    // `offset` is L of the queries; `first_slot` is where in their block the keys begin.
    __device__ __forceinline__ KeyOffsets(const BackwardParams& params, BlockCode key_block, int batch, int first_slot,
                                          const RelativePositionTile<T>* bias, const float (&offset)[2]) {
        if constexpr (kMaskedKeys) {
            const BlockPlace place(params.key_grid, key_block);
            is_masked_ = params.key_padding != nullptr || !place.is_full();
            if (is_masked_) existing_keys(exists_, params, place, batch, first_slot);
        }
        if constexpr (kRelativePosition) {
            const bool has_bias = part_of(key_block) == kImage && (!kDropout || params.relative_position);
            const int query = query_row_of_thread(), column = 2 * (threadIdx.x % 4);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = query + 8 * half;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 w = {0.0f, 0.0f};
                    if (has_bias) w = unpack<T>(*reinterpret_cast<const uint32_t*>(&bias->rel_w[row * 16 + 8 * i + column]));
                    of_column_[half][i] = {fmaf(w.x, kLog2E, -offset[half]), fmaf(w.y, kLog2E, -offset[half])};
                }
                of_row_[half] = {};
                if (has_bias) {
                    const auto rows = &bias->rel_h[row * kBiasTileHeight + first_slot / kBiasTileWidth];
                    of_row_[half] = *reinterpret_cast<const Rows*>(rows);
                }
            }
        }
    }

    // Scores become weights.
    __device__ __forceinline__ void exponentiate(float (&scores)[kKeys / 2], float scale_log2, const float (&offset)[2]) const {
#pragma unroll
        for (int i = 0; i < kKeys / 8; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 added = {-offset[half], -offset[half]};
                if constexpr (kRelativePosition) {
                    const float2 pair = unpack<T>(of_row_[half].pairs[i / 4]);
                    const float of_row = kLog2E * (i / 2 % 2 ? pair.y : pair.x);
                    added = {of_row + of_column_[half][i % 2].x, of_row + of_column_[half][i % 2].y};
                }
                float* const pair = &scores[4 * i + 2 * half];
                pair[0] = exp2_approximate(fmaf(pair[0], scale_log2, added.x));
                pair[1] = exp2_approximate(fmaf(pair[1], scale_log2, added.y));
            }
        }
        if constexpr (kMaskedKeys) {
            if (!is_masked_) return;
#pragma unroll
            for (int i = 0; i < kKeys / 2; i++) {
                if (!(exists_[i / 16] >> (8 * (i / 4 % 4) + i % 2) & 1)) scores[i] = 0.0f;
            }
        }
    }

  private:
    struct alignas(kKeys / 8) Rows {
        uint32_t pairs[kKeys / 32];
    };
    struct Nothing {};

    std::conditional_t<kRelativePosition, float2[2][2], Nothing> of_column_;
    std::conditional_t<kRelativePosition, Rows[2], Nothing> of_row_;
    std::conditional_t<kMaskedKeys, uint32_t[kKeys / 32], Nothing> exists_;
    bool is_masked_ = false;
};

}  // namespace sparse_attn
