#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WarpgroupInstance wide_d256(DType dtype, int rank, bool extended) { return wide_instance<256>(dtype, rank, extended); }

}  // namespace jax_natten::sm90
