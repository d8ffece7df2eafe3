#include "middle_instances.cuh"

namespace jax_natten::sm90 {

WarpgroupInstance middle_d128(DType dtype, int rank, int variant) { return middle_instance<128>(dtype, rank, variant); }

}  // namespace jax_natten::sm90
