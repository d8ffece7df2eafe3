#include "forward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance forward_d192(DType dtype, Precision precision, int rows, bool extended) {
  return forward_instance<192>(dtype, precision, rows, extended);
}

}  // namespace jax_natten::sm80
