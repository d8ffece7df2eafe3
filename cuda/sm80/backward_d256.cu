#include "backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance backward_d256(DType dtype, Precision precision, Pass pass) {
  return backward_instance<256>(dtype, precision, pass);
}

}  // namespace jax_natten::sm80
