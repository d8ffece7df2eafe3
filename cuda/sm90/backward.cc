#include "backward.h"

#include "../common/workspace.h"
#include "../naive/fused_backward.h"
#include "../sm80/fused.h"
#include "backward_additional.h"
#include "backward_setup.h"
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

// From delta as the query pass has left it.
cudaError_t launch_bias(const FusedBackwardParams& problem, cudaStream_t stream) {
  const int64_t positions = problem.neighborhood.positions();
  const float* minus_delta = static_cast<const float*>(problem.workspace) + least_fused_backward_workspace(problem);
  return sm80::backward_of_bias(problem, sm80::Precision::kTf32,
                                {minus_delta, positions * problem.heads, positions, 1, -1}, stream);
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
