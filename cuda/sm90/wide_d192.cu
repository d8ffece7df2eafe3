#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d192(DType dtype, int rank, bool early_exponentials) {
  return wide_instance_of<192>(dtype, rank, early_exponentials);
}

}  // namespace jax_natten::sm90
