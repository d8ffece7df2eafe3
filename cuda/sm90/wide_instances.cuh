// Instantiates the wide kernel for one head dimension.
#pragma once

#include "wide_forward.cuh"
#include "wide_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kRank>
WideInstance wide_instance_of() {
  return {wide_forward<T, kDim, kRank>, sizeof(typename WideTraits<T, kDim, kRank>::Shared)};
}

template <int kDim>
WideInstance wide_instance(DType dtype, int rank) {
  if (dtype == DType::kFloat16) {
    return rank == 1   ? wide_instance_of<__half, kDim, 1>()
           : rank == 2 ? wide_instance_of<__half, kDim, 2>()
                       : wide_instance_of<__half, kDim, 3>();
  }
  return rank == 1   ? wide_instance_of<__nv_bfloat16, kDim, 1>()
         : rank == 2 ? wide_instance_of<__nv_bfloat16, kDim, 2>()
                     : wide_instance_of<__nv_bfloat16, kDim, 3>();
}

}  // namespace jax_natten::sm90
