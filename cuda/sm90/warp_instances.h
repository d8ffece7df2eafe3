// The compiled instances of the warp kernel.
#pragma once

#include "../common/params.h"
#include "warp_params.h"

namespace jax_natten::sm90 {

// `list`: one of kWarpLists; `rank`: 2 (also for 1) or 3; `which`: one of warp_case() for the rank.
WarpKernel warp_d32(DType dtype, int list, int rank, WarpCase which);
WarpKernel warp_d64(DType dtype, int list, int rank, WarpCase which);
// Boxes of two heads of 32 channels, with lists of kWarpPairList.
WarpKernel warp_pair(DType dtype, int rank, WarpCase which);

}  // namespace jax_natten::sm90
