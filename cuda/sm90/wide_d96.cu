#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d96(DType dtype, int rank, bool early_exponentials) {
  return wide_instance_of<96>(dtype, rank, early_exponentials);
}

}  // namespace jax_natten::sm90
