#include "backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance backward_d256(DType dtype, Precision precision, Walk walk) {
  return backward_instance<256>(dtype, precision, walk);
}

}  // namespace jax_natten::sm80
