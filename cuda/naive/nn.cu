// Neighborhood-neighborhood: queries[x] = sum over slots of weights[x, slot] * keys_slot. One group of lanes per query
// and head; slots that a causal query does not see are not read.
#include "keys.cuh"
#include "launch.h"
#include "naive.h"

namespace jax_natten::naive {
namespace {

struct NnSteps {
  Steps key, weight;

  explicit NnSteps(const NnParams& p)
      : key(row_steps(p.neighborhood, int64_t(p.kv_heads) * p.dim)), weight(slot_steps(p.neighborhood)) {}
};

template <typename T>
struct WeightWalk {
  Box box;
  Stream<T> key, weight;
};

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, L::kMinBlocks)
    nn_kernel(const __grid_constant__ NnParams p, const __grid_constant__ Geometry geometry,
              const __grid_constant__ NnSteps steps, int64_t first_block) {
  using A = Accumulator<T>;
  constexpr int kKeys = L::kWhole ? 4 : 2;
  const int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const Item item = geometry.item(ordinal);
  const int64_t row = (item.batch * geometry.positions + item.place.position) * p.heads + item.head;
  const int kv_head = geometry.group.quotient(item.head);
  const Lane<L> lane(p.dim);
  const int64_t key_step = int64_t(p.kv_heads) * p.dim;
  const T* const weights = static_cast<const T*>(p.weights) + row * p.slots();

  // Rows longer than a span take one walk over the keys for each span.
  for (int begin = 0; begin == 0 || (!L::kWhole && begin < p.dim); begin += L::kSpan) {
    Fragment<T, L> total;
    const Box seen = keys_of_query(geometry, item.place);
    WeightWalk<T> walk = {item.valid ? seen : empty_box(),
                          {first_row<T>(p.keys, geometry.positions, p.kv_heads, item.batch, kv_head, seen, lane),
                           p.neighborhood.axes[2].dilation * key_step, steps.key.outer},
                          {weights, 1, steps.weight.outer}};
    for (bool window = true;; window = false) {
      Cursor cursor;
      while (__any_sync(kFullWarp, cursor.valid(walk.box))) {
        Stored<T, L> keys[kKeys];
        A weight[kKeys];
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          const bool valid = cursor.valid(walk.box);
          keys[k] = load<T, L>(walk.key.at, lane, begin, valid);
          weight[k] = 0;
          if (valid) weight[k] = load_one(walk.weight.at);
          cursor.advance(walk.box, walk.key, walk.weight);
        }
        Sum<T, L> step(total);
#pragma unroll
        for (int k = 0; k < kKeys; ++k) step.add(weight[k], keys[k]);
        step.finish();
      }
      if (!window) break;
      const Box box = linear_box(0, item.valid ? p.additional : 0);
      walk = {box,
              {first_row<T>(p.additional_keys, p.additional, p.kv_heads, item.batch, kv_head, box, lane), key_step,
               steps.key.outer},
              {weights + p.neighborhood.window_size(), 1, steps.weight.outer}};
    }
    if (item.valid) store<T, L>(static_cast<T*>(p.queries) + row * p.dim + lane.first, lane, total, begin);
  }
}

}  // namespace

cudaError_t nn(const NnParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kQueries, p.dim * bytes);
  const bool aligned = rows_aligned(bytes, {p.dim}, {p.keys, p.additional_keys, p.queries});
  return with_layout(p.dtype, p.dim, aligned, [&](auto type, auto layout) {
    using L = decltype(layout);
    return launch_blocks(nn_kernel<typename decltype(type)::Type, L>, blocks_for(geometry.items(), L::kGroups), stream,
                         p, geometry, NnSteps(p));
  });
}

}  // namespace jax_natten::naive
