// Instantiates the backward kernels for small windows of one pass.
#pragma once

#include "small_backward.cuh"
#include "small_instances.h"

namespace jax_natten::sm80 {

template <class Traits>
KernelInstance small_backward_kernel_of() {
  return {reinterpret_cast<const void*>(small_backward_kernel<Traits>), Traits::kThreads,
          int(sizeof(typename Traits::Shared))};
}

template <Pass kPass, int kDim>
KernelInstance small_backward_of_dim(DType dtype) {
  return dtype == DType::kFloat16
             ? small_backward_kernel_of<SmallBackwardTraits<HalfNumbers<__half>, kDim, kPass>>()
             : small_backward_kernel_of<SmallBackwardTraits<HalfNumbers<__nv_bfloat16>, kDim, kPass>>();
}

template <Pass kPass>
KernelInstance small_backward_instance(DType dtype, int dim) {
  return dim == 32 ? small_backward_of_dim<kPass, 32>(dtype) : small_backward_of_dim<kPass, 64>(dtype);
}

}  // namespace jax_natten::sm80
