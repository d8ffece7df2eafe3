// The compiled instances of the middle kernel, one translation unit per head dimension. `variant`: of middle_shape().
#pragma once

#include "../common/params.h"
#include "warpgroup_params.h"

namespace jax_natten::sm90 {

WarpgroupInstance middle_d32(DType dtype, int rank, int variant);
WarpgroupInstance middle_d64(DType dtype, int rank, int variant);
WarpgroupInstance middle_d96(DType dtype, int rank, int variant);
WarpgroupInstance middle_d128(DType dtype, int rank, int variant);

}  // namespace jax_natten::sm90
