#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d32(DType dtype, int rank, bool early_exponentials) {
  return wide_instance_of<32>(dtype, rank, early_exponentials);
}

}  // namespace jax_natten::sm90
