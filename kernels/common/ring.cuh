// A ring of buffers, walked by one side of a producer and its consumers.
#pragma once

#include <cstdint>

namespace sparse_attn {

// A place in the ring, and the parity its barriers reach when the buffer there is filled (or freed) this time round.
template <int kPlaces>
struct Ring {
    int place = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++place == kPlaces) {
            place = 0;
            parity ^= 1;
        }
    }
};

}  // namespace sparse_attn
