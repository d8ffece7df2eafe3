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

// CTAs of a multiprocessor that the registers of a backward kernel must allow for.
constexpr int small_backward_ctas(int dim, Pass pass) { return dim == 64 ? 3 : pass == Pass::kKeys ? 4 : 5; }

}  // namespace jax_natten::sm80
