// The compiled instances of the warp kernel, one translation unit per head dimension.
#pragma once

#include "../common/params.h"
#include "warp_params.h"

namespace jax_natten::sm90 {

// `list`: one of kWarpLists; `heads`: 1 or 2 per box (2: head dimension 32 only); `rank`: 2 (also for 1) or 3.
// `extended`: with additional keys and a relative position bias (KeyExtension).
WarpKernel warp_d32(DType dtype, int list, int heads, int rank, bool extended);
WarpKernel warp_d64(DType dtype, int list, int rank, bool extended);

}  // namespace jax_natten::sm90
