// The compiled instances of the warp kernel, one translation unit per head dimension.
#pragma once

#include "../common/params.h"
#include "warp_params.h"

namespace jax_natten::sm90 {

// `list`: one of kWarpLists; `heads`: 1 or 2 per box (2: head dimension 32 only); `rank`: 2 (also for 1) or 3.
WarpKernel warp_d32(DType dtype, int list, int heads, int rank);
WarpKernel warp_d64(DType dtype, int list, int rank);

}  // namespace jax_natten::sm90
