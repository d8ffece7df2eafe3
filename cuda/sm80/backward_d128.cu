#include "backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance backward_d128(DType dtype, Precision precision, Pass pass) {
  return backward_instance<128>(dtype, precision, pass);
}

}  // namespace jax_natten::sm80
