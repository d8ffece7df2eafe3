#include <cmath>

#include "forward_plan.h"
#include "fused.h"
#include "fused_setup.h"
#include "small_launch.h"

namespace jax_natten::sm80 {
namespace {

KernelInstance find_kernel(const FusedShape& shape, Precision precision, int rows) {
  const bool general = is_extended(shape);
  switch (forward_compiled_dim(shape)) {
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

}  // namespace

cudaError_t fused_forward(const FusedForwardParams& problem, Precision precision, const Plan& plan,
                          cudaStream_t stream) {
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;
  if (why_not_fused(problem) != nullptr || why_not_forward_plan(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (plan.structure == Structure::kSmall) return launch_small(problem, plan, stream);

  FusedParams params;
  const TileLimits tiles = forward_limits(problem, plan.rows);
  set_up_tiles(problem, plan, tiles.queries, tiles.keys, problem.heads, params);
  set_up_forward_arrays(problem, params);
  const bool general = is_extended(problem);
  params.query_factor = problem.scale > 0 ? 1.f : problem.scale < 0 ? -1.f : 0.f;
  params.scale = float(problem.scale * kLog2E);
  if (!general) params.scale = problem.scale == 0 ? kLog2E : std::abs(params.scale);
  return launch(find_kernel(problem, precision, plan.rows), params.schedule.tiles, params, stream);
}

const char* why_not_forward(const FusedForwardParams& problem) {
  if (const char* reason = why_not_fused(problem)) return reason;
  if (!problem.sm80_tiles.any()) return nullptr;
  Plan plan;
  if (const char* reason = decode_plan(problem.sm80_tiles, plan)) return reason;
  return why_not_forward_plan(problem, plan);
}

cudaError_t fused_forward(const FusedForwardParams& problem, Precision precision, cudaStream_t stream) {
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;
  if (why_not_forward(problem) != nullptr) return cudaErrorInvalidValue;
  Plan plan;
  if (problem.sm80_tiles.any()) {
    decode_plan(problem.sm80_tiles, plan);
  } else {
    plan = plan_forward(problem);
  }
  return fused_forward(problem, precision, plan, stream);
}

}  // namespace jax_natten::sm80
