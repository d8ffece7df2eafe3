// Instantiates the warp kernel for one head dimension.
#pragma once

#include "warp_forward.cuh"
#include "warp_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kHeads, int kRank, bool kExtended = false>
WarpKernel warp_instance_of_list(int list) {
  return list == 56   ? warp_forward<T, kDim, 56, kHeads, kRank, kExtended>
         : list == 80 ? warp_forward<T, kDim, 80, kHeads, kRank, kExtended>
                      : warp_forward<T, kDim, 104, kHeads, kRank, kExtended>;
}

// Extended variants are compiled for three axes only; those that a problem lacks have length 1.
template <typename T, int kDim, int kHeads>
WarpKernel warp_instance_of(int list, int rank, bool extended) {
  return extended    ? warp_instance_of_list<T, kDim, kHeads, 3, true>(list)
         : rank == 3 ? warp_instance_of_list<T, kDim, kHeads, 3>(list)
                     : warp_instance_of_list<T, kDim, kHeads, 2>(list);
}

template <int kDim, int kHeads>
WarpKernel warp_instance(DType dtype, int list, int rank, bool extended) {
  return dtype == DType::kFloat16 ? warp_instance_of<__half, kDim, kHeads>(list, rank, extended)
                                  : warp_instance_of<__nv_bfloat16, kDim, kHeads>(list, rank, extended);
}

}  // namespace jax_natten::sm90
