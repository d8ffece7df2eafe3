// Instantiates the wide kernel for one head dimension.
#pragma once

#include "plan.h"
#include "wide_forward.cuh"
#include "wide_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kRank, bool kExtended = false>
WarpgroupInstance wide_instance_of() {
  return {wide_forward<T, kDim, kRank, kExtended>,
          sizeof(typename WarpgroupTraits<WideKernel<kDim>, T, kRank, kExtended>::Shared)};
}

// Extended variants are compiled for three axes only; those that a problem lacks have length 1.
template <typename T, int kDim>
WarpgroupInstance wide_instance_of(int rank, bool extended) {
  return extended    ? wide_instance_of<T, kDim, 3, true>()
         : rank == 1 ? wide_instance_of<T, kDim, least_rank(kDim)>()
         : rank == 2 ? wide_instance_of<T, kDim, 2>()
                     : wide_instance_of<T, kDim, 3>();
}

template <int kDim>
WarpgroupInstance wide_instance(DType dtype, int rank, bool extended) {
  return dtype == DType::kFloat16 ? wide_instance_of<__half, kDim>(rank, extended)
                                  : wide_instance_of<__nv_bfloat16, kDim>(rank, extended);
}

}  // namespace jax_natten::sm90
