#include <algorithm>
#include <cmath>
#include <cstdint>

#include "forward_shape.h"
#include "fused.h"
#include "fused_setup.h"
#include "small_launch.h"

namespace jax_natten::sm80 {
namespace {

int compiled_dim(const FusedShape& shape) {
  return forward_dim(element_bytes(shape.dtype), std::max(shape.dim, shape.value_dim));
}

bool extended(const FusedShape& shape) {
  return shape.dtype == DType::kFloat32 || shape.additional > 0 || shape.has_bias();
}

// Kernels of 128 rows pay where windows have many times as many keys.
int default_rows(const FusedShape& shape) {
  const int bytes = element_bytes(shape.dtype), dim = compiled_dim(shape);
  const bool large = shape.neighborhood.window_size() >= 512;
  return large && !extended(shape) && forward_has_128_rows(bytes, dim) ? 128 : forward_least_rows(bytes, dim);
}

TileLimits limits(const FusedShape& shape, int rows) {
  const ForwardShape compiled = forward_shape(element_bytes(shape.dtype), compiled_dim(shape), rows);
  return {compiled.warps, rows / compiled.warps, compiled.keys};
}

KernelInstance find_kernel(const FusedShape& shape, Precision precision, int rows) {
  const bool general = extended(shape);
  switch (compiled_dim(shape)) {
    case 32:
      return forward_d32(shape.dtype, precision, rows, general);
    case 64:
      return forward_d64(shape.dtype, precision, rows, general);
    case 96:
      return forward_d96(shape.dtype, precision, rows, general);
    case 128:
      return forward_d128(shape.dtype, precision, rows, general);
    case 192:
      return forward_d192(shape.dtype, precision, rows, general);
    default:
      return forward_d256(shape.dtype, precision, rows, general);
  }
}

// A program that may run on several GPUs can hold the tiles of another implementation, which are as many numbers as
// that one wants.
bool asks_for_tiles(const FusedForwardParams& problem) { return problem.tile_fields == kPlanFields; }

}  // namespace

const char* why_not_forward_plan(const FusedShape& shape, const Plan& plan) {
  if (plan.structure == Structure::kSmall) return why_not_small(shape, plan);
  const int bytes = element_bytes(shape.dtype), dim = compiled_dim(shape), least = forward_least_rows(bytes, dim);
  if (plan.rows != least && !(plan.rows == 128 && forward_has_128_rows(bytes, dim) && !extended(shape))) {
    return "tiles have 64 queries, or 128 in float16 and bfloat16 up to a head dimension of 128 without bias and "
           "additional keys, or 32 in float32 with head dimensions over 192";
  }
  return why_not_tiles(shape, plan, limits(shape, plan.rows));
}

Plan plan_forward(const FusedShape& shape) {
  Plan plan;
  return plan_small(shape, plan) ? plan : choose_tiles(shape, limits(shape, default_rows(shape)));
}

cudaError_t fused_forward(const FusedForwardParams& problem, Precision precision, const Plan& plan,
                          cudaStream_t stream) {
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;
  if (why_not_fused(problem) != nullptr || why_not_forward_plan(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (plan.structure == Structure::kSmall) return launch_small(problem, plan, stream);

  FusedParams params;
  const TileLimits tiles = limits(problem, plan.rows);
  set_up_tiles(problem, plan, tiles.queries, tiles.keys, problem.heads, params);
  set_up_forward_arrays(problem, params);
  const bool general = extended(problem);
  params.query_factor = problem.scale > 0 ? 1.f : problem.scale < 0 ? -1.f : 0.f;
  params.scale = float(problem.scale * kLog2E);
  if (!general) params.scale = problem.scale == 0 ? kLog2E : std::abs(params.scale);
  return launch(find_kernel(problem, precision, plan.rows), params.schedule.tiles, params, stream);
}

const char* why_not_forward(const FusedForwardParams& problem) {
  if (const char* reason = why_not_fused(problem)) return reason;
  if (!asks_for_tiles(problem)) return nullptr;
  Plan plan;
  if (const char* reason = decode_plan(problem.tiles, problem.tile_fields, plan)) return reason;
  return why_not_forward_plan(problem, plan);
}

cudaError_t fused_forward(const FusedForwardParams& problem, Precision precision, cudaStream_t stream) {
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;
  if (why_not_forward(problem) != nullptr) return cudaErrorInvalidValue;
  Plan plan;
  if (!asks_for_tiles(problem)) {
    plan = plan_forward(problem);
  } else {
    decode_plan(problem.tiles, problem.tile_fields, plan);
  }
  return fused_forward(problem, precision, plan, stream);
}

}  // namespace jax_natten::sm80
