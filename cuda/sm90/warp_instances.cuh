// Instantiates the warp kernel for one head dimension.
#pragma once

#include "warp_forward.cuh"
#include "warp_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kRank, WarpCase kCase>
WarpKernel warp_instance_of(int list) {
  return list == 56   ? warp_forward<T, kDim, 56, 1, kRank, kCase>
         : list == 80 ? warp_forward<T, kDim, 80, 1, kRank, kCase>
                      : warp_forward<T, kDim, 104, 1, kRank, kCase>;
}

// kExtended is compiled for three axes only; those that a problem lacks have length 1.
template <typename T, int kDim>
WarpKernel warp_instance_of(int list, int rank, WarpCase which) {
  switch (which) {
    case WarpCase::kGeneral:
      return rank == 3 ? warp_instance_of<T, kDim, 3, WarpCase::kGeneral>(list)
                       : warp_instance_of<T, kDim, 2, WarpCase::kGeneral>(list);
    case WarpCase::kSliced:
      return warp_instance_of<T, kDim, 3, WarpCase::kSliced>(list);
    case WarpCase::kSingle:
      return warp_instance_of<T, kDim, 2, WarpCase::kSingle>(list);
    default:
      return warp_instance_of<T, kDim, 3, WarpCase::kExtended>(list);
  }
}

// Boxes of two heads.
template <typename T>
WarpKernel warp_instance_of_pair(int rank, WarpCase which) {
  return which == WarpCase::kSingle ? warp_forward<T, 32, kWarpPairList, 2, 2, WarpCase::kSingle>
         : rank == 3                ? warp_forward<T, 32, kWarpPairList, 2, 3, WarpCase::kGeneral>
                                    : warp_forward<T, 32, kWarpPairList, 2, 2, WarpCase::kGeneral>;
}

template <int kDim>
WarpKernel warp_instance(DType dtype, int list, int rank, WarpCase which) {
  return dtype == DType::kFloat16 ? warp_instance_of<__half, kDim>(list, rank, which)
                                  : warp_instance_of<__nv_bfloat16, kDim>(list, rank, which);
}

}  // namespace jax_natten::sm90
