// Host side of the backward's passes: from a problem and its tiles to what the kernels are told, and launching them.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "backward_params.h"
#include "backward_plan.h"
#include "tile_setup.h"

namespace jax_natten::sm90 {

// Which tensors are rows, columns and results of a pass. Null: none, or the caller encodes their maps.
struct PassTensors {
  const void *row[kOperands], *column[kOperands];
  void* result[kOperands];
  float* start[kOperands];
  int row_heads, column_heads;
};

PassTensors tensors_of(Walk pass, const FusedBackwardParams& problem);

// All but the extension. The grid of `problem` is that of the rows and columns.
cudaError_t set_up_pass(Walk pass, const FusedBackwardParams& problem, const PassTensors& tensors, const PassPlan& plan,
                        BackwardParams& params);

cudaError_t launch_pass(Walk pass, const FusedBackwardParams& problem, bool small, bool extended,
                        BackwardParams& params, cudaStream_t stream);

}  // namespace jax_natten::sm90
