#include "limits.h"

#include <algorithm>
#include <cstdint>

#include "backward_shape.h"
#include "dtype.h"
#include "unfused_plan.h"

namespace jax_natten::sm80 {

const char* why_not_fused(const FusedShape& shape) {
  if (shape.dtype == DType::kFloat64) return "takes float16, bfloat16 and float32 only";
  if (shape.dim > 256 || shape.value_dim > 256) return "takes head dimensions up to 256";
  if (shape.neighborhood.positions() > INT32_MAX) return "takes grids of up to 2^31 - 1 positions";
  double pairs = double(shape.batch) * shape.heads;  // dilation groups counted as if they were equally long
  for (const Axis& axis : shape.neighborhood.axes) pairs *= double(group_length(axis, 0)) * axis.dilation;
  if (pairs > INT32_MAX) return "takes up to 2^31 - 1 pairs of a query and a head";
  return nullptr;
}

const char* why_not_fused_backward(const FusedShape& shape) {
  if (const char* reason = why_not_fused(shape)) return reason;
  if (shape.batch * 64 * shape.kv_heads * additional_key_tiles(shape) > INT32_MAX)
    return "has too many additional keys";
  if (64 * shape.bias_batch * shape.heads > INT32_MAX) return "has too many bias tables";
  return nullptr;
}

int64_t additional_key_tiles(const FusedShape& shape) {
  const int bytes = element_bytes(shape.dtype);
  const int rows = backward_shape(bytes, forward_dim(bytes, std::max(shape.dim, shape.value_dim)), Pass::kKeys).rows;
  return (int64_t(shape.additional) + rows - 1) / rows;
}

const char* why_not(const UnfusedShape& shape, Operation operation) {
  if (shape.dtype == DType::kFloat64) return "takes float16, bfloat16 and float32";
  if (shape.dim > kMostDim) return "takes head dimensions up to 256";
  constexpr int64_t kMost = int64_t(1) << 30;
  if (shape.slots() > kMost || shape.neighborhood.positions() > kMost || shape.batch > kMost) {
    return "takes up to 2^30 slots, positions and batch elements";
  }
  // Numbers of CTAs and of their threads' rows.
  const int64_t heads = shape.batch * rows_heads(shape, operation), tiles = count_tiles(shape, UnfusedPlan());
  if (heads > 0 && tiles > INT32_MAX / heads) return "takes fewer than 2^31 rows of weights";
  if (operation == Operation::kIn && shape.additional > 0) {
    const int64_t sums = shape.batch * shape.additional * shape.kv_heads * shape.dim;
    if (dense_blocks(shape) > INT32_MAX || sums / 256 > INT32_MAX) return "has too many additional keys";
  }
  return nullptr;
}

}  // namespace jax_natten::sm80
