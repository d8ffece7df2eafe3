// Host side of the wide kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "tensor_map.h"

namespace jax_natten::sm90 {

// Tile shapes per axis.
struct WidePlan {
  int query_tile[kMaxRank] = {1, 1, 1};  // queries of a CTA: two parts
  int query_part[kMaxRank] = {1, 1, 1};  // queries of a warpgroup: at most 64
  int key_tile[kMaxRank] = {1, 1, 1};    // at most wide_shape(dim).keys
  bool early_exponentials = true;
  TensorMapLayout layout = TensorMapLayout::kSlabs;
};

// The head dimension that the kernel for `dim` is compiled for.
int wide_compiled_dim(int dim);

// Why the kernel cannot take a problem, in words; nullptr if it can.
const char* why_not_wide(const FusedShape& shape);

// Why a plan does not fit a problem; nullptr if it does.
const char* why_not_wide_plan(const FusedShape& shape, const WidePlan& plan);

// Enqueues the kernel. Neither allocates nor synchronises. cudaErrorInvalidValue if plan and problem do not fit.
cudaError_t launch_wide(const FusedForwardParams& problem, const WidePlan& plan, cudaStream_t stream);

}  // namespace jax_natten::sm90
