#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WideInstance wide_d128(DType dtype, int rank) { return wide_instance<128>(dtype, rank); }

}  // namespace jax_natten::sm90
