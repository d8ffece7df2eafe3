#include "small_backward_instances.cuh"

namespace jax_natten::sm80 {

KernelInstance small_backward_query(DType dtype, int dim) {
  return small_backward_instance<Pass::kQueries>(dtype, dim);
}

}  // namespace jax_natten::sm80
