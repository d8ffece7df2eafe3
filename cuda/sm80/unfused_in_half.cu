#include "unfused_in.cuh"
#include "unfused_instances.h"

namespace jax_natten::sm80 {
namespace {

template <typename T>
UnfusedKernel of_dim(int dim) {
  using Numbers = HalfNumbers<T>;
  return dim == 32    ? unfused_in<Numbers, 2>
         : dim == 64  ? unfused_in<Numbers, 4>
         : dim == 128 ? unfused_in<Numbers, 8>
                      : unfused_in<Numbers, 16>;
}

}  // namespace

UnfusedKernel in_half(DType dtype, int dim) {
  return dtype == DType::kFloat16 ? of_dim<__half>(dim) : of_dim<__nv_bfloat16>(dim);
}

SumKernel sum_half(DType dtype) {
  return dtype == DType::kFloat16 ? sum_partials<__half> : sum_partials<__nv_bfloat16>;
}

}  // namespace jax_natten::sm80
