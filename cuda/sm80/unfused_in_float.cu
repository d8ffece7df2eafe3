#include "unfused_in.cuh"
#include "unfused_instances.h"

namespace jax_natten::sm80 {
namespace {

template <class Numbers>
UnfusedKernel of_dim(int dim) {
  return dim == 32    ? unfused_in<Numbers, 4>
         : dim == 64  ? unfused_in<Numbers, 8>
         : dim == 128 ? unfused_in<Numbers, 16>
                      : unfused_in<Numbers, 32>;
}

}  // namespace

UnfusedKernel in_float(Precision precision, int dim) {
  return precision == Precision::kTf32 ? of_dim<Tf32Numbers>(dim) : of_dim<SplitTf32Numbers>(dim);
}

SumKernel sum_float() { return sum_partials<float>; }

}  // namespace jax_natten::sm80
