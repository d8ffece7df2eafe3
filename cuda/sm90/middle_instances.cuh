// Instantiates the middle kernel for one head dimension.
#pragma once

#include "middle_forward.cuh"
#include "middle_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kVariant, int kRank>
WarpgroupInstance middle_instance_of() {
  using Traits = WarpgroupTraits<MiddleKernel<kDim, kVariant>, T, kRank, false>;
  static_assert((sizeof(typename Traits::Shared) + 1024) * middle_blocks(kDim) <= 228 * 1024,
                "that many CTAs must fit on a multiprocessor");
  return {middle_forward<T, kDim, kVariant, kRank>, sizeof(typename Traits::Shared)};
}

// One axis is computed as two, of which the first has length 1.
template <typename T, int kDim>
WarpgroupInstance middle_instance_of(int rank, int variant) {
  if (rank == 3) return variant == 0 ? middle_instance_of<T, kDim, 0, 3>() : middle_instance_of<T, kDim, 1, 3>();
  return variant == 0 ? middle_instance_of<T, kDim, 0, 2>() : middle_instance_of<T, kDim, 1, 2>();
}

template <int kDim>
WarpgroupInstance middle_instance(DType dtype, int rank, int variant) {
  return dtype == DType::kFloat16 ? middle_instance_of<__half, kDim>(rank, variant)
                                  : middle_instance_of<__nv_bfloat16, kDim>(rank, variant);
}

}  // namespace jax_natten::sm90
