#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d64(DType dtype, int rank, bool early_exponentials) {
  return wide_instance_of<64>(dtype, rank, early_exponentials);
}

}  // namespace jax_natten::sm90
