// Fused forward: out = softmax(scale * q . k + bias) v over a query's window and the additional keys, and its LSE.
// One group of lanes per query and head; a few keys at a time through an online softmax.
#include "keys.cuh"
#include "launch.h"
#include "naive.h"

namespace jax_natten::naive {
namespace {

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, L::kMinBlocks)
    fused_forward_kernel(const __grid_constant__ FusedForwardParams p, const __grid_constant__ Geometry geometry,
                         const __grid_constant__ KeySteps steps, int64_t first_block) {
  using A = Accumulator<T>;
  constexpr int kKeys = L::kWhole ? 4 : 2;
  const int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const Item item = geometry.item(ordinal);
  const int64_t row = (item.batch * geometry.positions + item.place.position) * p.heads + item.head;
  const Lane<L> key_lane(p.dim), value_lane(p.value_dim);
  const Row<T, L> query(static_cast<const T*>(p.query) + row * p.dim, key_lane);
  const A scale = static_cast<A>(p.scale);

  // Value rows longer than a span take one walk over the keys for each span.
  for (int begin = 0; begin == 0 || (!L::kWhole && begin < p.value_dim); begin += L::kSpan) {
    A maximum = -INFINITY, sum = 0;
    Fragment<T, L> out;
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
        A score[kKeys];
        query.dot(key, valid, score);
        Stored<T, L> values[kKeys];
#pragma unroll
        for (int k = 0; k < kKeys; ++k) values[k] = load<T, L>(value[k], value_lane, begin, valid[k]);

        A next = maximum;
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          score[k] = fma(scale, score[k], bias[k]);
          if (valid[k]) next = fmax(next, score[k]);
        }
        // All scores so far may be -inf (an infinite key or bias): they count as zeros beside later, finite ones.
        const A base = next == -INFINITY ? A(0) : next;
        const A correction = exponential<T>(maximum - base);
        maximum = next;
        A step = 0;
        Fragment<T, L> step_out;
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          const A probability = valid[k] ? exponential<T>(score[k] - base) : A(0);
          step += probability;
          add_scaled<T, L>(step_out, probability, values[k]);
        }
        // The long sums are rounded once a step, not once a key.
        sum = fma(sum, correction, step);
#pragma unroll
        for (int e = 0; e < L::kElements; ++e) {
          out.element[e] = fma(out.element[e], correction, step_out.element[e]);
        }
      }
      if (!window) break;
      walk = walk_additional<T>(p, geometry, steps, item, key_lane, value_lane);
    }
    if (item.valid) {
      const A normalizer = 1 / sum;
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) out.element[e] *= normalizer;
      store<T, L>(static_cast<T*>(p.out) + row * p.value_dim + value_lane.first, value_lane, out, begin);
      if (begin == 0 && value_lane.first == 0) static_cast<A*>(p.lse)[row] = maximum + log(sum);
    }
  }
}

}  // namespace

cudaError_t fused_forward(const FusedForwardParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kQueries, p.dim * bytes);
  const bool aligned = rows_aligned(bytes, {p.dim, p.value_dim},
                                    {p.query, p.key, p.value, p.additional_keys, p.additional_values, p.out});
  return with_layout(p.dtype, std::max(p.dim, p.value_dim), aligned, [&](auto type, auto layout) {
    using L = decltype(layout);
    return launch_blocks(fused_forward_kernel<typename decltype(type)::Type, L>,
                         blocks_for(geometry.items(), L::kGroups), stream, p, geometry, KeySteps(p));
  });
}

}  // namespace jax_natten::naive
