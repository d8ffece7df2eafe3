#include "small_backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance small_backward_key(DType dtype, int dim) { return small_backward_instance<Pass::kKeys>(dtype, dim); }

}  // namespace jax_natten::sm80
