#include "backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance backward_d192(DType dtype, Precision precision, Pass pass) {
  return backward_instance<192>(dtype, precision, pass);
}

}  // namespace jax_natten::sm80
