#include "backward_plan.h"

#include "../sm80/limits.h"

namespace jax_natten::sm90 {

const char* why_not_any_backward(const FusedShape& shape) {
  if (const char* reason = why_not_any(shape)) return reason;
  if (shape.has_bias()) {
    // Rows and columns of a tile are up to 256 steps apart, in 32 bits.
    if (shape.neighborhood.bias_size() > 1 << 22) return "takes bias tables of up to 2^22 entries per head";
    if (const char* reason = sm80::why_not_fused_backward(shape)) return reason;  // its kernel computes the gradient
  }
  if (shape.heads == 0) return "needs a query head";
  return nullptr;
}

const char* why_not_pass(Walk pass, const FusedShape& shape, const PassPlan& plan) {
  const int dim = compiled_head_dim(shape.dim);
  if (plan.small && !has_small_shape(dim)) return "has no variant for small windows at this head dimension";
  if (const char* reason = why_not_tiles(shape, plan, row_heads(pass, shape))) return reason;
  const PassShape compiled = pass_shape(pass, dim, plan.small);
  if (product(plan.query_tile) != compiled.parts * product(plan.query_part)) {
    return compiled.parts == 2 ? "row tiles must have two parts" : "row tiles must have one part";
  }
  if (product(plan.query_part) > kPartRows) return "a part has at most 64 rows";
  if (product(plan.key_tile) > compiled.columns) return "column tiles have too many columns";
  return nullptr;
}

const char* why_not(const FusedShape& shape, const BackwardPlan& plan) {
  if (const char* reason = why_not_any_backward(shape)) return reason;
  if (const char* reason = why_not_pass(kQueryPass, shape, plan.query)) return reason;
  return why_not_pass(kKeyPass, shape, plan.key);
}

}  // namespace jax_natten::sm90
