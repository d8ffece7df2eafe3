// Fused backward, query pass: delta = rowsum(out * d_out) - d_lse and d_query. One group of lanes per query and head.
#include "fused_backward.h"
#include "keys.cuh"
#include "launch.h"

namespace jax_natten::naive {
namespace {

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, L::kMinBlocks)
    backward_query_kernel(const __grid_constant__ FusedBackwardParams p, const __grid_constant__ Geometry geometry,
                          const __grid_constant__ KeySteps steps, int64_t first_block) {
  using A = Accumulator<T>;
  constexpr int kKeys = !L::kWhole ? 1 : L::kVectors == 1 ? 4 : 2;
  const int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const Item item = geometry.item(ordinal);
  const int64_t row = (item.batch * geometry.positions + item.place.position) * p.heads + item.head;
  const Lane<L> key_lane(p.dim), value_lane(p.value_dim);
  const Row<T, L> query(static_cast<const T*>(p.query) + row * p.dim, key_lane);
  const Row<T, L> d_out(static_cast<const T*>(p.d_out) + row * p.value_dim, value_lane);
  const A scale = static_cast<A>(p.scale), lse = static_cast<const A*>(p.lse)[row];

  A delta;
  {
    const T* const out[1] = {static_cast<const T*>(p.out) + row * p.value_dim + value_lane.first};
    A product[1];
    d_out.dot(out, {true}, product);
    delta = product[0] - static_cast<const A*>(p.d_lse)[row];
    if (item.valid && key_lane.first == 0) static_cast<A*>(p.workspace)[row] = delta;
  }

  // Rows longer than a span take one walk over the keys for each span.
  for (int begin = 0; begin == 0 || (!L::kWhole && begin < p.dim); begin += L::kSpan) {
    Fragment<T, L> d_query;
    KeyWalk<T, L> walk = walk_window<T>(p, geometry, steps, item, key_lane, value_lane);
    for (bool window = true;; window = false) {
      while (__any_sync(kFullWarp, walk.valid())) {
        const T *key[kKeys], *value[kKeys];
        A bias[kKeys];
        bool valid[kKeys];
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          valid[k] = walk.valid();
          key[k] = walk.key.at;
          value[k] = walk.value.at;
          bias[k] = walk.bias_or_zero();
          walk.advance();
        }
        A score[kKeys], d_probability[kKeys];
        Stored<T, L> keys[kKeys];
        query.dot(key, valid, score, keys);
        d_out.dot(value, valid, d_probability);
        keep_span<T, L>(key, valid, key_lane, begin, keys);
        Sum<T, L> step(d_query);
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          const A probability = exponential<T>(fma(scale, score[k], bias[k]) - lse);
          const A d_score = valid[k] ? probability * (d_probability[k] - delta) : A(0);
          step.add(d_score, keys[k]);
        }
        step.finish();
      }
      if (!window) break;
      walk = walk_additional<T>(p, geometry, steps, item, key_lane, value_lane);
    }
    if (item.valid) {
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) d_query.element[e] *= scale;
      store<T, L>(static_cast<T*>(p.d_query) + row * p.dim + key_lane.first, key_lane, d_query, begin);
    }
  }
}

}  // namespace

cudaError_t backward_of_queries(const FusedBackwardParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kQueries, p.dim * bytes);
  const bool aligned =
      rows_aligned(bytes, {p.dim, p.value_dim},
                   {p.query, p.key, p.value, p.additional_keys, p.additional_values, p.out, p.d_out, p.d_query});
  return with_layout(p.dtype, std::max(p.dim, p.value_dim), aligned, [&](auto type, auto layout) {
    using L = decltype(layout);
    return launch_blocks(backward_query_kernel<typename decltype(type)::Type, L>,
                         blocks_for(geometry.items(), L::kGroups), stream, p, geometry, KeySteps(p));
  });
}

}  // namespace jax_natten::naive
