// Instantiates the backward kernels of one head dimension.
#pragma once

#include "backward_bias.cuh"
#include "backward_instances.h"
#include "fused_backward.cuh"

namespace jax_natten::sm80 {

template <class Traits>
KernelInstance instance_of(void (*kernel)(BackwardParams), size_t shared_bytes) {
  return {reinterpret_cast<const void*>(kernel), Traits::kThreads, int(shared_bytes)};
}

template <class Numbers, int kDim, Pass kPass>
KernelInstance backward_kernel() {
  using Traits = BackwardTraits<Numbers, kDim, kPass>;
  if constexpr (kPass == Pass::kBias) {
    return instance_of<Traits>(backward_bias_kernel<Traits>, sizeof(BiasShared<Traits>));
  } else {
    return instance_of<Traits>(fused_backward_kernel<Traits>, sizeof(typename Traits::Shared));
  }
}

template <int kDim, Pass kPass>
KernelInstance backward_pass(DType dtype, Precision precision) {
  if (dtype == DType::kFloat16) return backward_kernel<HalfNumbers<__half>, kDim, kPass>();
  if (dtype == DType::kBFloat16) return backward_kernel<HalfNumbers<__nv_bfloat16>, kDim, kPass>();
  if constexpr (!forward_has_dim(sizeof(float), kDim)) {
    return {nullptr, 0, 0};
  } else if constexpr (kPass == Pass::kBias) {  // not worth a kernel for each precision
    return backward_kernel<SplitTf32Numbers, kDim, kPass>();
  } else {
    return precision == Precision::kTf32 ? backward_kernel<Tf32Numbers, kDim, kPass>()
                                         : backward_kernel<SplitTf32Numbers, kDim, kPass>();
  }
}

template <int kDim>
KernelInstance backward_instance(DType dtype, Precision precision, Pass pass) {
  return pass == Pass::kQueries ? backward_pass<kDim, Pass::kQueries>(dtype, precision)
         : pass == Pass::kKeys  ? backward_pass<kDim, Pass::kKeys>(dtype, precision)
                                : backward_pass<kDim, Pass::kBias>(dtype, precision);
}

}  // namespace jax_natten::sm80
