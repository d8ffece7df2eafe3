// Instantiates the warp kernel for one head dimension.
#pragma once

#include "warp_forward.cuh"
#include "warp_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kHeads, int kRank>
WarpKernel warp_instance_of_list(int list) {
  return list == 56   ? warp_forward<T, kDim, 56, kHeads, kRank>
         : list == 80 ? warp_forward<T, kDim, 80, kHeads, kRank>
                      : warp_forward<T, kDim, 104, kHeads, kRank>;
}

template <int kDim, int kHeads>
WarpKernel warp_instance(DType dtype, int list, int rank) {
  if (dtype == DType::kFloat16) {
    return rank == 3 ? warp_instance_of_list<__half, kDim, kHeads, 3>(list)
                     : warp_instance_of_list<__half, kDim, kHeads, 2>(list);
  }
  return rank == 3 ? warp_instance_of_list<__nv_bfloat16, kDim, kHeads, 3>(list)
                   : warp_instance_of_list<__nv_bfloat16, kDim, kHeads, 2>(list);
}

}  // namespace jax_natten::sm90
