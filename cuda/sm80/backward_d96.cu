#include "backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance backward_d96(DType dtype, Precision precision, Pass pass) {
  return backward_instance<96>(dtype, precision, pass);
}

}  // namespace jax_natten::sm80
