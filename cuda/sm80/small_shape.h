// Sizes of the forward kernels for small windows.
#pragma once

namespace jax_natten::sm80 {

constexpr int kSmallWarps = 4;
constexpr int kSmallRows = 16 * kSmallWarps;  // queries of a CTA
constexpr int kSmallLists[] = {64, 112};      // keys of a warp
constexpr int kSmallDims[] = {32, 64};

// The shortest compiled list that holds `keys`; 0: none.
constexpr int small_list(int keys) {
  for (const int compiled : kSmallLists) {
    if (keys <= compiled) return compiled;
  }
  return 0;
}

}  // namespace jax_natten::sm80
