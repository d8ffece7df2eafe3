#include "middle_instances.cuh"

namespace jax_natten::sm90 {

WarpgroupInstance middle_d32(DType dtype, int rank, int variant) { return middle_instance<32>(dtype, rank, variant); }

}  // namespace jax_natten::sm90
