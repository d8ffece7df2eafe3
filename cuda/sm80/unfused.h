// Unfused neighborhood attention by tensor cores, on compute capability 8.0 and later: the entry points.
//
// The papers' first result (arXiv 2403.04690) is that neighborhood attention is a batched product of matrices. All
// three operations (../common/params.h) take any grid of 1 to 3 axes, window, stride, dilation and causal axes, head
// dims up to 256, fewer key heads than query heads, additional keys; PN also a relative position bias. float16 and
// bfloat16 are accumulated in float32. Results have the same bits in every run.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "limits.h"
#include "precision.h"
#include "unfused_plan.h"

namespace jax_natten::sm80 {

// Enqueue a problem's computation; nothing is allocated, nothing waits. `precision` is that of float32. A plan
// overrides the one of choose_tiling(). cudaErrorInvalidValue if the problem is not taken, or not under this plan.
cudaError_t pn(const PnParams& problem, cudaStream_t stream, Precision precision = Precision::kSplitTf32,
               const UnfusedPlan* plan = nullptr);
cudaError_t nn(const NnParams& problem, cudaStream_t stream, Precision precision = Precision::kSplitTf32,
               const UnfusedPlan* plan = nullptr);
cudaError_t in(const InParams& problem, cudaStream_t stream, Precision precision = Precision::kSplitTf32,
               const UnfusedPlan* plan = nullptr);

}  // namespace jax_natten::sm80
