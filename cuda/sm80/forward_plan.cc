#include "forward_plan.h"

#include <algorithm>

#include "dtype.h"
#include "forward_shape.h"
#include "small_plan.h"

namespace jax_natten::sm80 {
namespace {

// Kernels of 128 rows pay where windows have many times as many keys.
int default_rows(const FusedShape& shape) {
  const bool large = shape.neighborhood.window_size() >= 512;
  return large && forward_has_rows(shape, 128)
             ? 128
             : forward_least_rows(element_bytes(shape.dtype), forward_compiled_dim(shape));
}

}  // namespace

int forward_compiled_dim(const FusedShape& shape) {
  return forward_dim(element_bytes(shape.dtype), std::max(shape.dim, shape.value_dim));
}

bool is_extended(const FusedShape& shape) {
  return shape.dtype == DType::kFloat32 || shape.additional > 0 || shape.has_bias();
}

bool forward_has_rows(const FusedShape& shape, int rows) {
  const int bytes = element_bytes(shape.dtype), dim = forward_compiled_dim(shape);
  return rows == forward_least_rows(bytes, dim) ||
         (rows == 128 && forward_has_128_rows(bytes, dim) && !is_extended(shape));
}

TileLimits forward_limits(const FusedShape& shape, int rows) {
  const ForwardShape compiled = forward_shape(element_bytes(shape.dtype), forward_compiled_dim(shape), rows);
  return {compiled.warps, rows / compiled.warps, compiled.keys};
}

const char* why_not_forward_plan(const FusedShape& shape, const Plan& plan) {
  if (plan.structure == Structure::kSmall) return why_not_small(shape, plan);
  if (!forward_has_rows(shape, plan.rows)) {
    return "tiles have 64 queries, or 128 in float16 and bfloat16 up to a head dimension of 128 without bias and "
           "additional keys, or 32 in float32 with head dimensions over 192";
  }
  return why_not_tiles(shape, plan, forward_limits(shape, plan.rows));
}

Plan plan_forward(const FusedShape& shape) {
  Plan plan;
  return plan_small(shape, plan) ? plan : choose_tiles(shape, forward_limits(shape, default_rows(shape)));
}

}  // namespace jax_natten::sm80
