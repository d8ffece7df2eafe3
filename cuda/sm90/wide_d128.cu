#include "wide_instances.cuh"

namespace jax_natten::sm90 {

WarpgroupInstance wide_d128(DType dtype, int rank, bool extended) { return wide_instance<128>(dtype, rank, extended); }

}  // namespace jax_natten::sm90
