// Instantiates the kernel of one pass for one head dimension. To be included after the kernel.
#pragma once

#include "backward_instances.h"
#include "backward_tiles.cuh"
#include "plan.h"

namespace jax_natten::sm90 {

// Pass: its kernel<T, kDim, kRank, kSmall, kExtended>() returns the kernel.
template <class Pass, typename T, int kDim, int kRank, bool kSmall, bool kExtended>
BackwardInstance backward_instance_of() {
  return {Pass::template kernel<T, kDim, kRank, kSmall, kExtended>(),
          sizeof(typename PassTraits<T, Pass::kPass, kDim, kRank, kSmall, kExtended>::Shared)};
}

// Extended variants are compiled for three axes only; those that a problem lacks have length 1.
template <class Pass, typename T, int kDim, bool kSmall>
BackwardInstance backward_instance_of(int rank, bool extended) {
  return extended    ? backward_instance_of<Pass, T, kDim, 3, kSmall, true>()
         : rank == 1 ? backward_instance_of<Pass, T, kDim, least_rank(kDim), kSmall, false>()
         : rank == 2 ? backward_instance_of<Pass, T, kDim, 2, kSmall, false>()
                     : backward_instance_of<Pass, T, kDim, 3, kSmall, false>();
}

template <class Pass, int kDim, bool kSmall>
BackwardInstance backward_instance_of(DType dtype, int rank, bool extended) {
  return dtype == DType::kFloat16 ? backward_instance_of<Pass, __half, kDim, kSmall>(rank, extended)
                                  : backward_instance_of<Pass, __nv_bfloat16, kDim, kSmall>(rank, extended);
}

template <class Pass, int kDim>
BackwardInstance backward_instance(DType dtype, int rank, bool small, bool extended) {
  if constexpr (has_small_shape(kDim)) {
    if (small) return backward_instance_of<Pass, kDim, true>(dtype, rank, extended);
  }
  return backward_instance_of<Pass, kDim, false>(dtype, rank, extended);
}

}  // namespace jax_natten::sm90
