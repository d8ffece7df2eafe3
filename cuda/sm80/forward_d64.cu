#include "forward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance forward_d64(DType dtype, Precision precision, int rows, bool extended) {
  return forward_instance<64>(dtype, precision, rows, extended);
}

}  // namespace jax_natten::sm80
