#include "small_plan.h"

#include "forward_shape.h"
#include "small_setup.h"
#include "small_shape.h"

namespace jax_natten::sm80 {
namespace {

constexpr const char* kTooManyKeys = "a warp's queries see too many keys";

const char* why_not_window(const FusedShape& shape) {
  if (const char* reason = why_not_any_small(shape)) return reason;
  return shape.neighborhood.window_size() > kSmallLists[1] ? kTooManyKeys : nullptr;
}

const char* why_not_boxes(const FusedShape& shape, const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
  for (const int keys : list) {  // the product may be large
    if (keys > kSmallLists[1]) return kTooManyKeys;
  }
  if (product(list) > kSmallLists[1]) return kTooManyKeys;
  if (small_forward_bytes(small_dim(shape)) + 2 * bytes_of_box(shape, box) > kSharedBytesOfAnyDevice) {
    return "the keys of a query tile do not fit into shared memory";
  }
  return nullptr;
}

}  // namespace

const char* why_not_small(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_window(shape)) return reason;
  if (plan.rows != kSmallRows) return "tiles have 64 queries";
  if (product(plan.key_tile) != 1) return "keys are not cut into tiles: their sizes must be 1";
  if (const char* reason = why_not_tiles(shape, plan, kSmallTiles)) return reason;
  int list[kMaxRank], box[kMaxRank];
  find_box(shape, plan.query_part, Walk::kKeysOfQueries, list);
  find_box(shape, plan.query_tile, Walk::kKeysOfQueries, box);
  return why_not_boxes(shape, list, box);
}

double cost_of_small_tile(const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
  // Copying a key of the box takes about as long as multiplying half a key of the four lists.
  return small_list(product(list)) + 0.5 * product(box);
}

bool plan_small(const FusedShape& shape, Plan& plan) {
  if (why_not_window(shape) != nullptr) return false;
  const auto cost = [&](const Plan&, const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
    return why_not_boxes(shape, list, box) != nullptr ? -1. : cost_of_small_tile(list, box);
  };
  return search_small(shape, Walk::kKeysOfQueries, cost, plan);
}

}  // namespace jax_natten::sm80
