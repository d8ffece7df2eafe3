// What the "middle" kernel (middle_forward.cuh) is compiled for. Plain code without CUDA.
#pragma once

#include "warpgroup_shape.h"

namespace jax_natten::sm90 {

// Head dimensions that it is compiled for: those of compiled_head_dim() up to this.
constexpr int kMiddleMostDim = 128;
// Key columns of the compiled variants of a head dimension, ascending.
constexpr int kMiddleVariants = 2;

constexpr WarpgroupShape middle_shape(int dim, int variant) {
  return dim == 32   ? WarpgroupShape{32, variant == 0 ? 80 : 112, 2, 2, 32}
         : dim == 64 ? WarpgroupShape{64, variant == 0 ? 80 : 112, 2, 2, 64}
         : dim == 96 ? WarpgroupShape{96, variant == 0 ? 80 : 112, 2, 2, 32}
                     : WarpgroupShape{128, variant == 0 ? 64 : 80, 2, variant == 0 ? 2 : 1, 64};
}

// The smallest variant that holds key tiles of so many keys; kMiddleVariants if none does.
constexpr int middle_variant(int dim, int keys) {
  for (int variant = 0; variant < kMiddleVariants; ++variant) {
    if (keys <= middle_shape(dim, variant).keys) return variant;
  }
  return kMiddleVariants;
}

// CTAs that share a multiprocessor. They stand for what one CTA of the wide kernel does by pipelining.
constexpr int middle_blocks(int dim) { return dim <= 64 ? 3 : 2; }

constexpr int kMiddleThreads = 128 + 32;  // a consumer warpgroup and a producer warp

}  // namespace jax_natten::sm90
