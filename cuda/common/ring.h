#pragma once

#include <cstdint>

namespace jax_natten {

// Place in a ring and the parity of the barrier phase there.
template <int kSize>
struct RingPosition {
  int index = 0;
  uint32_t parity;

  __device__ explicit RingPosition(uint32_t parity) : parity(parity) {}
  // One step before the first place, whose phase there has parity 0.
  __device__ static RingPosition before_first() {
    RingPosition position(1);
    position.index = kSize - 1;
    return position;
  }
  __device__ __forceinline__ void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jax_natten
