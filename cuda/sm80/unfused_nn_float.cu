#include "unfused_instances.h"
#include "unfused_nn.cuh"

namespace jax_natten::sm80 {
namespace {

template <class Numbers>
UnfusedKernel of_dim(int dim) {
  return dim == 32    ? unfused_nn<Numbers, 4>
         : dim == 64  ? unfused_nn<Numbers, 8>
         : dim == 128 ? unfused_nn<Numbers, 16>
                      : unfused_nn<Numbers, 32>;
}

}  // namespace

UnfusedKernel nn_float(Precision precision, int dim) {
  return precision == Precision::kTf32 ? of_dim<Tf32Numbers>(dim) : of_dim<SplitTf32Numbers>(dim);
}

}  // namespace jax_natten::sm80
