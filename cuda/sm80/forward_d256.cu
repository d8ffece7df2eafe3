#include "forward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance forward_d256(DType dtype, Precision precision, int rows, bool extended) {
  return forward_instance<256>(dtype, precision, rows, extended);
}

}  // namespace jax_natten::sm80
