#include "backward_instances.cuh"
#include "backward_key.cuh"

namespace jax_natten::sm90 {

BackwardInstance backward_key_d96(DType dtype, int rank, bool small, bool extended) {
  return backward_instance<KeyPass, 96>(dtype, rank, small, extended);
}

}  // namespace jax_natten::sm90
