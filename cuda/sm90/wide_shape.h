// What the "wide" kernel (wide_forward.cuh) is compiled for. Plain code without CUDA.
#pragma once

#include "warpgroup_shape.h"

namespace jax_natten::sm90 {

constexpr WarpgroupShape wide_shape(int dim) {
  return dim == 32    ? WarpgroupShape{32, 128, 4, 2, 32}
         : dim == 64  ? WarpgroupShape{64, 128, 3, 2, 64}
         : dim == 96  ? WarpgroupShape{96, 128, 2, 2, 32}
         : dim == 128 ? WarpgroupShape{128, 128, 2, 2, 64}
         : dim == 192 ? WarpgroupShape{192, 96, 2, 1, 64}
                      : WarpgroupShape{256, 64, 2, 1, 64};
}

constexpr int kWideGroups = 2;  // consumer warpgroups
constexpr int kWideThreads = 128 * (kWideGroups + 1);

}  // namespace jax_natten::sm90
