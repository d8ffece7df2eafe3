#include "backward.h"

#include <algorithm>

#include "../common/workspace.h"
#include "../naive/fused_backward.h"
#include "../sm80/fused.h"
#include "backward_additional.h"
#include "backward_setup.h"
#include "cost.h"
#include "extension_setup.h"

namespace jax_natten::sm90 {
namespace {

// Additional keys are columns of the query pass behind those of the window box. The bias is that of a key and a query
// wherever they meet.
cudaError_t set_up_extension(Walk pass, const FusedBackwardParams& problem, const PassPlan& plan,
                             BackwardParams& params) {
  if (pass == kQueryPass) {
    const PassShape compiled = pass_shape(pass, compiled_head_dim(problem.dim), plan.small);
    const cudaError_t error = set_up_additional(problem, problem.additional_keys, problem.additional_values,
                                                {compiled.chunk, 1, {}}, product(plan.key_tile), params.extension);
    if (error != cudaSuccess) return error;
  }
  if (problem.has_bias()) {
    set_up_bias(problem, problem.bias, params.extension, params.exponent);
    for (int& step : params.extension.bias_step) step = pass == kQueryPass ? step : -step;
  }
  return cudaSuccess;
}

// From delta as the query pass has left it. Partial tables lie where those of the other implementations do, and where
// the other number of each query and head was, which nobody reads any more: a table for each CTA, and as many CTAs as
// are resident at a time, of at least a tile of queries each.
cudaError_t launch_bias(const FusedBackwardParams& problem, cudaStream_t stream) {
  constexpr int64_t kResident = 4 * kProcessors, kTile = 64;
  const int64_t positions = problem.neighborhood.positions(), tables = problem.bias_batch * problem.heads;
  const int64_t size = naive::bias_gradient_size(problem);
  const int64_t room = naive::bias_partials(problem) / size + reduction_chunks(positions);
  const int64_t tiles = problem.batch / problem.bias_batch * ((positions + kTile - 1) / kTile);
  sm80::BiasWorkspace workspace;
  workspace.partials = static_cast<float*>(problem.workspace);
  workspace.chunks = int(std::min({room, tiles, (kResident + tables - 1) / tables}));
  const float* minus_delta = workspace.partials + least_fused_backward_workspace(problem);
  workspace.delta = {minus_delta, positions * problem.heads, positions, 1, -1};
  return sm80::backward_of_bias(problem, sm80::Precision::kTf32, workspace, stream);
}

}  // namespace

cudaError_t launch_backward_pass(Walk pass, const FusedBackwardParams& problem, const BackwardPlan& plan,
                                 cudaStream_t stream) {
  if (why_not(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (is_empty(problem)) return cudaSuccess;
  if (problem.workspace_size < fused_backward_workspace(problem)) return cudaErrorInvalidValue;
  const PassPlan& own = pass == kQueryPass ? plan.query : plan.key;
  const bool extended = pass == kQueryPass ? is_extended(problem) : problem.has_bias();
  BackwardParams params;
  cudaError_t error = set_up_pass(pass, problem, tensors_of(pass, problem), own, params);
  if (error == cudaSuccess && extended) error = set_up_extension(pass, problem, own, params);
  return error != cudaSuccess ? error : launch_pass(pass, problem, own.small, extended, params, stream);
}

cudaError_t launch_backward(const FusedBackwardParams& problem, const BackwardPlan& plan, cudaStream_t stream) {
  if (is_empty(problem)) return naive::fill_sums_with_zeros(problem, stream);
  for (const Walk pass : {kQueryPass, kKeyPass}) {
    if (const cudaError_t error = launch_backward_pass(pass, problem, plan, stream)) return error;
  }
  if (problem.additional > 0) {
    if (const cudaError_t error = launch_additional(problem, stream)) return error;
  }
  return problem.has_bias() ? launch_bias(problem, stream) : cudaSuccess;
}

}  // namespace jax_natten::sm90
