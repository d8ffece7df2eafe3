#include "forward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance forward_d32(DType dtype, Precision precision, int rows, bool extended) {
  return forward_instance<32>(dtype, precision, rows, extended);
}

}  // namespace jax_natten::sm80
