#include "forward_setup.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "extension_setup.h"

namespace jax_natten::sm90 {
namespace {

// The pair (factor, factor) in the problem's type.
uint32_t pair_of(DType dtype, bool minus_one) {
  if (!minus_one) return 0;
  return dtype == DType::kFloat16 ? 0xBC00BC00u : 0xBF80BF80u;
}

}  // namespace

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

cudaError_t set_up_extension(const FusedForwardParams& problem, const Plan& plan, int channels, int box,
                             ForwardParams& params) {
  const TensorBox rows = {channels, plan.heads, {}};
  const cudaError_t error =
      set_up_additional(problem, problem.additional_keys, problem.additional_values, rows, box, params.extension);
  if (error != cudaSuccess) return error;
  if (problem.has_bias()) set_up_bias(problem, problem.bias, params.extension, params.scale);
  return cudaSuccess;
}

}  // namespace jax_natten::sm90
