#include "forward_setup.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace jax_natten::sm90 {
namespace {

// The pair (factor, factor) in the problem's type.
uint32_t pair_of(DType dtype, bool minus_one) {
  if (!minus_one) return 0;
  return dtype == DType::kFloat16 ? 0xBC00BC00u : 0xBF80BF80u;
}

}  // namespace

const char* why_not_any(const FusedShape& shape) {
  if (const char* reason = why_not_layout(shape)) return reason;
  if (shape.additional > 0) return "does not take additional keys yet";
  if (shape.has_bias()) return "does not take a relative position bias yet";
  return nullptr;
}

const char* why_not_tiles(const FusedShape& shape, const Plan& plan) {
  if (plan.heads > 1 && (shape.heads % plan.heads != 0 || shape.group() != 1)) {
    return "tiles of several heads need a multiple of them, each with its own keys";
  }
  return why_not_tiles(shape, plan, shape.heads / plan.heads);
}

cudaError_t set_up_forward(const FusedForwardParams& problem, const Plan& plan, int channels, bool query_box_is_part,
                           ForwardParams& params) {
  const Neighborhood& neighborhood = problem.neighborhood;
  set_up_tiles(problem, plan, problem.heads / plan.heads, params);
  params.query_address = slab_address(neighborhood, problem.heads);
  params.key_address = slab_address(neighborhood, problem.kv_heads);
  params.out = problem.out;
  params.lse = static_cast<float*>(problem.lse);
  params.dim = problem.dim;
  // The kernels want a positive scale: maxima of scores must stay maxima, and masked scores of -inf must not meet 0.
  constexpr double kLog2E = 1.4426950408889634;
  params.has_query_factor = !(problem.scale > 0);
  params.query_factor = pair_of(problem.dtype, problem.scale < 0);
  params.scale = float((problem.scale == 0 ? 1.0 : std::abs(problem.scale)) * kLog2E);

  const int (&query)[kMaxRank] = query_box_is_part ? plan.query_part : plan.query_tile;
  const TensorBox query_box = {channels, plan.heads, {query[0], query[1], query[2]}};
  const TensorBox key_box = {channels, plan.heads, {plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]}};
  for (int variant = 0; variant < kMaxMapVariants; ++variant) {
    if (!variant_exists(neighborhood, variant)) continue;
    TensorMaps& maps = params.maps[variant];
    const auto encode = [&](CUtensorMap& map, const void* data, int heads, const TensorBox& box) {
      return encode_tensor_map(&map, problem, data, heads, box, variant);
    };
    for (const cudaError_t error : {encode(maps.query, problem.query, problem.heads, query_box),
                                    encode(maps.key, problem.key, problem.kv_heads, key_box),
                                    encode(maps.value, problem.value, problem.kv_heads, key_box),
                                    encode(maps.out, problem.out, problem.heads, query_box)}) {
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

int most_keys_of_queries(const Axis& axis, int queries) {
  int most = 0;
  for (const int group : {0, axis.dilation - 1}) {
    const int length = group_length(axis, group);
    for (int first = 0; first < length; first += queries) {
      const int last = std::min(first + queries, length) - 1;
      most = std::max(most, window_of_query(axis, last, length).end - window_of_query(axis, first, length).begin);
    }
  }
  return most;
}

}  // namespace jax_natten::sm90
