// Instantiates the backward kernels of one head dimension.
#pragma once

#include "backward_instances.h"
#include "fused_backward.cuh"

namespace jax_natten::sm80 {

template <class Numbers, int kDim, Walk kWalk>
KernelInstance backward_kernel() {
  using Traits = BackwardTraits<Numbers, kDim, kWalk>;
  return {reinterpret_cast<const void*>(fused_backward_kernel<Traits>), Traits::kThreads,
          int(sizeof(typename Traits::Shared))};
}

template <int kDim, Walk kWalk>
KernelInstance backward_pass(DType dtype, Precision precision) {
  if (dtype == DType::kFloat16) return backward_kernel<HalfNumbers<__half>, kDim, kWalk>();
  if (dtype == DType::kBFloat16) return backward_kernel<HalfNumbers<__nv_bfloat16>, kDim, kWalk>();
  return precision == Precision::kTf32 ? backward_kernel<Tf32Numbers, kDim, kWalk>()
                                       : backward_kernel<SplitTf32Numbers, kDim, kWalk>();
}

template <int kDim>
KernelInstance backward_instance(DType dtype, Precision precision, Walk walk) {
  return walk == Walk::kKeysOfQueries ? backward_pass<kDim, Walk::kKeysOfQueries>(dtype, precision)
                                      : backward_pass<kDim, Walk::kQueriesOfKeys>(dtype, precision);
}

}  // namespace jax_natten::sm80
