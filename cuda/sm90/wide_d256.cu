#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d256(DType dtype, int rank, bool early_exponentials) {
  return wide_instance_of<256>(dtype, rank, early_exponentials);
}

}  // namespace jax_natten::sm90
