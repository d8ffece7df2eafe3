#pragma once

#include <cstdint>

namespace jax_natten {

// Place in a ring and the parity of the barrier phase there.
template <int kSize>
struct RingPosition {
  int index = 0;
  uint32_t parity;

  __device__ explicit RingPosition(uint32_t parity) : parity(parity) {}
  __device__ __forceinline__ void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jax_natten
