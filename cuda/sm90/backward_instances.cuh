// Instantiates the kernel of one pass for one head dimension. To be included after the kernel.
#pragma once

#include "backward_instances.h"
#include "backward_tiles.cuh"

namespace jax_natten::sm90 {

// Pass: its kernel<T, kDim, kRank, kSmall>() returns the kernel.
template <class Pass, typename T, int kDim, int kRank>
BackwardInstance backward_instance_of(bool small) {
  if constexpr (has_small_shape(kDim)) {
    if (small) {
      return {Pass::template kernel<T, kDim, kRank, true>(),
              sizeof(typename PassTraits<T, Pass::kPass, kDim, kRank, true>::Shared)};
    }
  }
  return {Pass::template kernel<T, kDim, kRank, false>(),
          sizeof(typename PassTraits<T, Pass::kPass, kDim, kRank, false>::Shared)};
}

template <class Pass, int kDim>
BackwardInstance backward_instance(DType dtype, int rank, bool small) {
  if (dtype == DType::kFloat16) {
    return rank == 1   ? backward_instance_of<Pass, __half, kDim, 1>(small)
           : rank == 2 ? backward_instance_of<Pass, __half, kDim, 2>(small)
                       : backward_instance_of<Pass, __half, kDim, 3>(small);
  }
  return rank == 1   ? backward_instance_of<Pass, __nv_bfloat16, kDim, 1>(small)
         : rank == 2 ? backward_instance_of<Pass, __nv_bfloat16, kDim, 2>(small)
                     : backward_instance_of<Pass, __nv_bfloat16, kDim, 3>(small);
}

}  // namespace jax_natten::sm90
