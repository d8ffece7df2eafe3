// Instantiates the forward kernels of one head dimension.
#pragma once

#include "forward_instances.h"
#include "fused_forward.cuh"

namespace jax_natten::sm80 {

template <class Numbers, int kDim, int kRows, bool kExtended>
KernelInstance forward_kernel() {
  using Traits = ForwardTraits<Numbers, kDim, kRows, kExtended>;
  return {reinterpret_cast<const void*>(fused_forward_kernel<Traits>), Traits::kThreads,
          int(sizeof(typename Traits::Shared))};
}

template <typename T, int kDim>
KernelInstance forward_half(int rows, bool extended) {
  using Numbers = HalfNumbers<T>;
  if (extended) return forward_kernel<Numbers, kDim, 64, true>();
  if constexpr (forward_has_128_rows(sizeof(T), kDim)) {
    if (rows == 128) return forward_kernel<Numbers, kDim, 128, false>();
  }
  return forward_kernel<Numbers, kDim, 64, false>();
}

template <int kDim>
KernelInstance forward_instance(DType dtype, Precision precision, int rows, bool extended) {
  if (dtype == DType::kFloat16) return forward_half<__half, kDim>(rows, extended);
  if (dtype == DType::kBFloat16) return forward_half<__nv_bfloat16, kDim>(rows, extended);
  if constexpr (forward_has_dim(sizeof(float), kDim)) {
    constexpr int kRows = forward_least_rows(sizeof(float), kDim);
    return precision == Precision::kTf32 ? forward_kernel<Tf32Numbers, kDim, kRows, true>()
                                         : forward_kernel<SplitTf32Numbers, kDim, kRows, true>();
  } else {
    return {nullptr, 0, 0};
  }
}

}  // namespace jax_natten::sm80
