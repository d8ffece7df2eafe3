#include "unfused_instances.h"
#include "unfused_pn.cuh"

namespace jax_natten::sm80 {
namespace {

template <typename T>
UnfusedKernel of_dim(int dim) {
  using Numbers = HalfNumbers<T>;
  return dim == 32    ? unfused_pn<Numbers, 2>
         : dim == 64  ? unfused_pn<Numbers, 4>
         : dim == 128 ? unfused_pn<Numbers, 8>
                      : unfused_pn<Numbers, 16>;
}

}  // namespace

UnfusedKernel pn_half(DType dtype, int dim) {
  return dtype == DType::kFloat16 ? of_dim<__half>(dim) : of_dim<__nv_bfloat16>(dim);
}

}  // namespace jax_natten::sm80
