// Host side shared by the sm_90 forward kernels: from a problem and its tiles to what the kernels are told.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "forward_params.h"
#include "plan.h"
#include "tile_setup.h"

namespace jax_natten::sm90 {

// Tensor maps and all else but the mask. Rows of boxes have `channels` channels; boxes of queries are whole query tiles
// or parts of them.
cudaError_t set_up_forward(const FusedForwardParams& problem, const Plan& plan, int channels, bool query_box_is_part,
                           ForwardParams& params);

// What the extended variants need besides. `box`: additional keys that are loaded together, no more than keys of a key
// tile. After set_up_forward().
cudaError_t set_up_extension(const FusedForwardParams& problem, const Plan& plan, int channels, int box,
                             ForwardParams& params);

}  // namespace jax_natten::sm90
