#include "backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance backward_d128(DType dtype, Precision precision, Walk walk) {
  return backward_instance<128>(dtype, precision, walk);
}

}  // namespace jax_natten::sm80
