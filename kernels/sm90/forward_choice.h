// Which kernel computes full attention without a relative position (host): measured, not derived.
#pragma once

#include "../params.h"
#include "launch_device.cuh"

namespace sparse_attn {

// The tall kernel takes as long for its 192 rows as two thirds of what the paired kernel takes for 256 of them, and
// stays with static work: it pays where that fills the multiprocessors evenly.
inline bool tall_is_faster(const ForwardParams& params, int head_dim, int device) {
    if (params.key_counts != nullptr || params.dropout.seed != nullptr || head_dim <= 32 || head_dim > 64) return false;
    const int64_t problems = int64_t(params.batch) * params.query_heads, blocks = params.query_grid.num_blocks;
    const int64_t tall = problems * ((2 * blocks + 2) / 3), paired = problems * blocks;
    const int64_t processors = multiprocessors(device), rounds = (tall + processors - 1) / processors;
    return 4 * processors * rounds < 3 * paired;
}

}  // namespace sparse_attn
