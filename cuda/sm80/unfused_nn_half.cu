#include "unfused_instances.h"
#include "unfused_nn.cuh"

namespace jax_natten::sm80 {
namespace {

template <typename T>
UnfusedKernel of_dim(int dim) {
  using Numbers = HalfNumbers<T>;
  return dim == 32    ? unfused_nn<Numbers, 2>
         : dim == 64  ? unfused_nn<Numbers, 4>
         : dim == 128 ? unfused_nn<Numbers, 8>
                      : unfused_nn<Numbers, 16>;
}

}  // namespace

UnfusedKernel nn_half(DType dtype, int dim) {
  return dtype == DType::kFloat16 ? of_dim<__half>(dim) : of_dim<__nv_bfloat16>(dim);
}

}  // namespace jax_natten::sm80
