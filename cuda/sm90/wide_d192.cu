#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d192(DType dtype, int rank) { return wide_instance<192>(dtype, rank); }

}  // namespace jax_natten::sm90
