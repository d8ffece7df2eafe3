#include "small_setup.h"

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace jax_natten::sm80 {

const char* why_not_any_small(const FusedShape& shape) {
  if (shape.dtype != DType::kFloat16 && shape.dtype != DType::kBFloat16) return "takes float16 and bfloat16 only";
  if (std::max(shape.dim, shape.value_dim) > 64) return "takes head dimensions up to 64";
  if (shape.additional > 0) return "takes no additional keys";
  return nullptr;
}

int small_dim(const FusedShape& shape) { return std::max(shape.dim, shape.value_dim) <= 32 ? 32 : 64; }

void find_box(const FusedShape& shape, const int (&queries)[kMaxRank], Walk walk, int (&box)[kMaxRank]) {
  for (int a = 0; a < kMaxRank; ++a) box[a] = most_keys_of_queries(shape.neighborhood.axes[a], queries[a], walk);
}

int bytes_of_box(const FusedShape& shape, const int (&box)[kMaxRank]) {
  const int64_t bytes = int64_t(box[0]) * box[1] * box[2] * small_dim(shape) * element_bytes(shape.dtype);
  return int(std::min<int64_t>((bytes + 127) / 128 * 128, INT32_MAX / 4));
}

void set_up_box(const FusedShape& shape, const int (&sides)[kMaxRank], SmallBox& box) {
  std::copy(sides, sides + kMaxRank, box.box);
  box.by_box1 = FastDivisor(box.box[1]);
  box.by_box2 = FastDivisor(box.box[2]);
  box.box_rows = product(box.box);
  box.box_bytes = bytes_of_box(shape, box.box);
}

}  // namespace jax_natten::sm80
