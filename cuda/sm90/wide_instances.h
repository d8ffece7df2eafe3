// The compiled instances of the wide kernel, one translation unit per head dimension. `extended`: with additional keys
// and a relative position bias (KeyExtension).
#pragma once

#include "../common/params.h"
#include "warpgroup_params.h"

namespace jax_natten::sm90 {

WarpgroupInstance wide_d32(DType dtype, int rank, bool extended);
WarpgroupInstance wide_d64(DType dtype, int rank, bool extended);
WarpgroupInstance wide_d96(DType dtype, int rank, bool extended);
WarpgroupInstance wide_d128(DType dtype, int rank, bool extended);
WarpgroupInstance wide_d192(DType dtype, int rank, bool extended);
WarpgroupInstance wide_d256(DType dtype, int rank, bool extended);

}  // namespace jax_natten::sm90
