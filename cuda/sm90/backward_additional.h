// The gradients of additional keys and values, which every query sees: key passes whose rows are those and whose
// columns are all queries of the grid, as if it had one axis.
//
// The queries are cut into chunks, so that there are enough row tiles for all multiprocessors. Chunk c holds every
// chunks-th position from c on: to the kernel they are dilation groups. Each leaves partial sums in the workspace, and
// the sums of those are taken in order. So the result does not depend on when a CTA runs, nor on the device.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"

namespace jax_natten::sm90 {

// For a problem with additional keys that the backward takes, after its query pass.
cudaError_t launch_additional(const FusedBackwardParams& problem, cudaStream_t stream);

}  // namespace jax_natten::sm90
