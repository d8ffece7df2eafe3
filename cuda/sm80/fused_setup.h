// Host side shared by the fused kernels: from a problem and its tiles to what the kernels are told.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "dtype.h"
#include "forward_instances.h"
#include "fused_params.h"
#include "plan.h"

namespace jax_natten::sm80 {

// A [batch, positions, heads, size] array of the problem's type.
RowArray row_array(DType dtype, const void* data, int64_t positions, int heads, int size);

// All but the arrays, `scale` and `query_factor`. `columns` of the compiled tiles that pass by; `heads` that tiles stay
// for.
void set_up_tiles(const FusedShape& shape, const Plan& plan, int rows_of_warp, int columns, int heads,
                  FusedParams& params);

// The arrays of a forward problem.
void set_up_forward_arrays(const FusedForwardParams& problem, FusedParams& params);

// Launches a kernel with a CTA for each tile, after allowing it its shared memory. `params` is what it takes.
cudaError_t launch_tiles(const KernelInstance& kernel, int tiles, void* params, cudaStream_t stream);

template <class Params>
cudaError_t launch(const KernelInstance& kernel, int tiles, Params params, cudaStream_t stream) {
  return launch_tiles(kernel, tiles, &params, stream);
}

}  // namespace jax_natten::sm80
