#include "../naive/fused_backward.h"

#include <algorithm>
#include <cstdint>

#include "../common/workspace.h"
#include "backward_instances.h"
#include "backward_params.h"
#include "backward_shape.h"
#include "backward_sums.h"
#include "fused.h"
#include "fused_setup.h"
#include "small_backward_launch.h"
#include "small_shape.h"

namespace jax_natten::sm80 {
namespace {

int compiled_dim(const FusedShape& shape) {
  return forward_dim(element_bytes(shape.dtype), std::max(shape.dim, shape.value_dim));
}

BackwardShape compiled_shape(const FusedShape& shape, Pass pass) {
  return backward_shape(element_bytes(shape.dtype), compiled_dim(shape), pass);
}

TileLimits limits(const FusedShape& shape, Pass pass) {
  const BackwardShape compiled = compiled_shape(shape, pass);
  return {compiled.parts(), compiled.warp_rows(), compiled.columns};
}

KernelInstance find_kernel(const FusedShape& shape, Precision precision, Pass pass) {
  switch (compiled_dim(shape)) {
    case 32:
      return backward_d32(shape.dtype, precision, pass);
    case 64:
      return backward_d64(shape.dtype, precision, pass);
    case 96:
      return backward_d96(shape.dtype, precision, pass);
    case 128:
      return backward_d128(shape.dtype, precision, pass);
    case 192:
      return backward_d192(shape.dtype, precision, pass);
    default:
      return backward_d256(shape.dtype, precision, pass);
  }
}

// `queries` of a part and `keys` of a key tile as compiled.
void set_up(const FusedBackwardParams& problem, const Plan& plan, Pass pass, int queries, int keys,
            BackwardParams& params) {
  const int64_t positions = problem.neighborhood.positions();
  const int staying_heads = pass == Pass::kKeys ? problem.kv_heads : problem.heads;
  set_up_tiles(problem, plan, queries, keys, staying_heads, params);
  const auto array = [&](const void* data, int64_t rows, int heads, int size) {
    return row_array(problem.dtype, data, rows, heads, size);
  };
  params.query = array(problem.query, positions, problem.heads, problem.dim);
  params.key = array(problem.key, positions, problem.kv_heads, problem.dim);
  params.value = array(problem.value, positions, problem.kv_heads, problem.value_dim);
  params.additional_key = array(problem.additional_keys, problem.additional, problem.kv_heads, problem.dim);
  params.additional_value = array(problem.additional_values, problem.additional, problem.kv_heads, problem.value_dim);
  params.out = array(problem.out, positions, problem.heads, problem.value_dim);
  params.d_out = array(problem.d_out, positions, problem.heads, problem.value_dim);
  params.d_query = array(problem.d_query, positions, problem.heads, problem.dim);
  params.d_key = array(problem.d_key, positions, problem.kv_heads, problem.dim);
  params.d_value = array(problem.d_value, positions, problem.kv_heads, problem.value_dim);
  params.bias = problem.has_bias() ? static_cast<const float*>(problem.bias) : nullptr;
  params.lse = static_cast<float*>(const_cast<void*>(problem.lse));
  params.d_lse = static_cast<const float*>(problem.d_lse);
  params.delta = static_cast<float*>(problem.workspace);
  params.problem_scale = float(problem.scale);
  params.scale = float(problem.scale * kLog2E);
  params.query_factor = 1;
  params.dim = problem.dim;
  params.value_dim = problem.value_dim;
  params.kv_heads = problem.kv_heads;
  params.partials = nullptr;
  params.chunks = reduction_chunks(positions);
  params.additional_tiles = int(additional_key_tiles(problem));
  params.bias_partials = nullptr;
  params.tiles_of_head = int(params.schedule.tiles / (problem.batch * staying_heads));
  params.bias_batch = int(problem.bias_batch);
}

void set_up(const FusedBackwardParams& problem, const Plan& plan, Pass pass, BackwardParams& params) {
  const TileLimits tiles = limits(problem, pass);
  set_up(problem, plan, pass, tiles.queries, tiles.keys, params);
}

// The query pass or the key pass, without additional keys as rows. `params` are set up.
cudaError_t launch_pass(const FusedBackwardParams& problem, Precision precision, const Plan& plan, Pass pass,
                        BackwardParams& params, cudaStream_t stream) {
  if (plan.structure == Structure::kSmall) {
    set_up(problem, with_segments(problem, plan, pass), pass, kSmallRows / kSmallWarps, kMostColumns, params);
    return launch_small_backward(problem, plan, pass, params, stream);
  }
  set_up(problem, plan, pass, params);
  return launch(find_kernel(problem, precision, pass), params.schedule.tiles, params, stream);
}

const char* why_not_pass(const FusedShape& shape, const Plan& plan, Pass pass) {
  if (plan.structure == Structure::kSmall) return why_not_small_backward(shape, plan, pass);
  return why_not_tiles(shape, plan, limits(shape, pass));
}

Plan plan_pass(const FusedShape& shape, Pass pass) {
  const TileLimits tiles = limits(shape, pass);
  return plan_backward_pass(shape, pass, choose_tiles(shape, tiles), tiles);
}

bool is_empty(const FusedShape& shape) { return shape.batch * shape.neighborhood.positions() * shape.heads == 0; }

}  // namespace

const char* why_not_backward_plan(const FusedShape& shape, const BackwardPlan& plan) {
  if (const char* reason = why_not_pass(shape, plan.queries, Pass::kQueries)) return reason;
  if (const char* reason = why_not_pass(shape, plan.keys, Pass::kKeys)) return reason;
  if (!shape.has_bias()) return nullptr;
  if (plan.bias.structure != Structure::kTiles) return "the gradient of the bias has kernels for all windows only";
  return why_not_tiles(shape, plan.bias, limits(shape, Pass::kBias));
}

BackwardPlan plan_backward(const FusedShape& shape) {
  return {plan_pass(shape, Pass::kQueries), plan_pass(shape, Pass::kKeys),
          choose_tiles(shape, limits(shape, Pass::kBias))};
}

cudaError_t fused_backward(const FusedBackwardParams& problem, Precision precision, const BackwardPlan& plan,
                           cudaStream_t stream) {
  if (is_empty(problem)) return naive::fill_sums_with_zeros(problem, stream);
  if (why_not_fused_backward(problem) != nullptr || why_not_backward_plan(problem, plan) != nullptr) {
    return cudaErrorInvalidValue;
  }
  BackwardParams params;
  if (auto error = launch_pass(problem, precision, plan.queries, Pass::kQueries, params, stream)) return error;
  if (auto error = launch_pass(problem, precision, plan.keys, Pass::kKeys, params, stream)) return error;

  if (problem.additional > 0) {
    const KernelInstance key_pass = find_kernel(problem, precision, Pass::kKeys);
    params.partials = static_cast<float*>(problem.workspace) + naive::additional_partials(problem);
    const int64_t tiles = problem.batch * params.chunks * problem.kv_heads * params.additional_tiles;
    if (auto error = launch(key_pass, int(tiles), params, stream)) return error;
    if (auto error = sum_additional(problem, params.chunks, stream)) return error;
  }
  if (!problem.has_bias()) return cudaSuccess;
  const int64_t positions = problem.neighborhood.positions();
  const BiasWorkspace workspace = {
      {params.delta, positions * problem.heads, 1, problem.heads, 1},
      static_cast<float*>(problem.workspace) + naive::bias_partials(problem),
      params.chunks,
  };
  return backward_of_bias(problem, precision, plan.bias, workspace, stream);
}

cudaError_t backward_of_bias(const FusedBackwardParams& problem, Precision precision, const Plan& plan,
                             const BiasWorkspace& workspace, cudaStream_t stream) {
  BackwardParams params;
  set_up(problem, plan, Pass::kBias, params);
  params.bias_delta = workspace.delta;
  params.bias_partials = workspace.partials;
  params.chunks = workspace.chunks;
  const KernelInstance bias_pass = find_kernel(problem, precision, Pass::kBias);
  const int64_t tables = params.chunks * problem.bias_batch * problem.heads;
  if (auto error = launch(bias_pass, int(tables), params, stream)) return error;
  return sum_bias(problem, workspace.partials, workspace.chunks, stream);
}

cudaError_t backward_of_bias(const FusedBackwardParams& problem, Precision precision, const BiasWorkspace& workspace,
                             cudaStream_t stream) {
  if (why_not_fused_backward(problem) != nullptr) return cudaErrorInvalidValue;
  return backward_of_bias(problem, precision, choose_tiles(problem, limits(problem, Pass::kBias)), workspace, stream);
}

cudaError_t fused_backward(const FusedBackwardParams& problem, Precision precision, cudaStream_t stream) {
  if (is_empty(problem)) return naive::fill_sums_with_zeros(problem, stream);
  if (why_not_fused_backward(problem) != nullptr) return cudaErrorInvalidValue;
  return fused_backward(problem, precision, plan_backward(problem), stream);
}

}  // namespace jax_natten::sm80
