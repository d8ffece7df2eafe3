// Sizes of the kernels for small windows.
#pragma once

#include "backward_shape.h"

namespace jax_natten::sm80 {

constexpr int kSmallWarps = 4;
constexpr int kSmallRows = 16 * kSmallWarps;  // queries of a CTA, or keys
constexpr int kSmallLists[] = {64, 112};      // keys of a warp in the forward
constexpr int kSmallDims[] = {32, 64};

// The shortest compiled list that holds `keys`; 0: none.
constexpr int small_list(int keys) {
  for (const int compiled : kSmallLists) {
    if (keys <= compiled) return compiled;
  }
  return 0;
}

// Shared memory of a CTA of the forward for the longest list, without its boxes: queries and tables.
constexpr int small_forward_bytes(int dim) { return 2 * kSmallRows * dim + 4352; }

// Shared memory of a CTA of the backward: two fit on every device (of 100 KB, 1 KB goes with each CTA), three or four
// on those for servers.
constexpr int kSmallBackwardBytes = 49 * 1024;

// Longest windows of the backward: of longer ones, tiles of 64 columns waste little. Entries of a bias table so fit
// into 32 bits.
constexpr int kMostKeysOfSmallBackward = 256;

// CTAs of a multiprocessor that the registers of a backward kernel must allow for.
constexpr int small_backward_ctas(int dim, Pass pass) { return (dim == 64 ? 4 : 5) - (pass == Pass::kKeys ? 1 : 0); }

}  // namespace jax_natten::sm80
