#include "small_forward.cuh"
#include "small_instances.h"

namespace jax_natten::sm80 {
namespace {

template <typename T, int kDim, int kKeys>
KernelInstance instance() {
  using Traits = SmallTraits<HalfNumbers<T>, kDim, kKeys>;
  return {reinterpret_cast<const void*>(small_forward_kernel<Traits>), Traits::kThreads,
          int(sizeof(typename Traits::Shared))};
}

template <typename T>
KernelInstance instance_of(int dim, int list) {
  if (dim == 32) return list == 64 ? instance<T, 32, 64>() : instance<T, 32, 112>();
  return list == 64 ? instance<T, 64, 64>() : instance<T, 64, 112>();
}

}  // namespace

KernelInstance small_forward(DType dtype, int dim, int list) {
  return dtype == DType::kFloat16 ? instance_of<__half>(dim, list) : instance_of<__nv_bfloat16>(dim, list);
}

}  // namespace jax_natten::sm80
