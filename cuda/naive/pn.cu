// Pointwise-neighborhood: weights[x, slot] = <queries_x, keys_slot> (+ bias). One group of lanes per query and head.
#include "keys.cuh"
#include "launch.h"
#include "naive.h"

namespace jax_natten::naive {
namespace {

struct PnSteps {
  Steps key, bias;

  explicit PnSteps(const PnParams& p)
      : key(row_steps(p.neighborhood, int64_t(p.kv_heads) * p.dim)), bias(bias_steps(p.neighborhood, 1)) {}
};

// Walks over slots in their order: over the whole window, of which a causal query sees only the first `seen` keys on
// each axis, then over the additional keys.
template <typename T>
struct SlotWalk {
  Box box;
  int seen[kMaxRank];
  Stream<T> key;
  Stream<Accumulator<T>> bias;
  bool has_bias;
};

template <typename T, class L>
__device__ __forceinline__ SlotWalk<T> walk_window(const PnParams& p, const Geometry& geometry, const PnSteps& steps,
                                                   const Item& item, int kv_head, const Lane<L>& lane) {
  const Neighborhood& window = p.neighborhood;
  const Box seen = keys_of_query(geometry, item.place);
  Box box = {0, {}, {window.axes[0].window, window.axes[1].window, window.axes[2].window}};
  return {item.valid ? box : empty_box(),
          {seen.count[0], seen.count[1], seen.count[2]},
          {first_row<T>(p.keys, geometry.positions, p.kv_heads, item.batch, kv_head, seen, lane),
           int64_t(window.axes[2].dilation) * p.kv_heads * p.dim, steps.key.outer},
          {first_bias<T>(p, geometry, item, seen), 1, steps.bias.outer},
          p.has_bias()};
}

template <typename T, class L>
__device__ __forceinline__ SlotWalk<T> walk_additional(const PnParams& p, const PnSteps& steps, const Item& item,
                                                       int kv_head, const Lane<L>& lane) {
  const Box box = linear_box(0, p.additional);
  return {item.valid ? box : empty_box(),
          {1, 1, p.additional},
          {first_row<T>(p.additional_keys, p.additional, p.kv_heads, item.batch, kv_head, box, lane),
           int64_t(p.kv_heads) * p.dim, steps.key.outer},
          {nullptr, 1, steps.bias.outer},
          false};
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, L::kMinBlocks)
    pn_kernel(const __grid_constant__ PnParams p, const __grid_constant__ Geometry geometry,
              const __grid_constant__ PnSteps steps, int64_t first_block) {
  using A = Accumulator<T>;
  constexpr int kKeys = L::kWhole ? 4 : 2;
  const int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const Item item = geometry.item(ordinal);
  const int64_t row = (item.batch * geometry.positions + item.place.position) * p.heads + item.head;
  const int kv_head = geometry.group.quotient(item.head);
  const Lane<L> lane(p.dim);
  const Row<T, L> query(static_cast<const T*>(p.queries) + row * p.dim, lane);
  const int own = threadIdx.x % L::kLanes;  // this lane stores the own-th weight of every step
  T fill;
  narrow(p.fill_negative_infinity ? A(-INFINITY) : A(0), fill);

  T* weights = static_cast<T*>(p.weights) + row * p.slots() + own;
  SlotWalk<T> walk = walk_window<T>(p, geometry, steps, item, kv_head, lane);
  for (bool window = true;; window = false) {
    Cursor cursor;
    for (T* at = weights; __any_sync(kFullWarp, cursor.valid(walk.box)); at += kKeys) {
      const T* keys[kKeys];
      A bias[kKeys], product[kKeys];
      bool slot[kKeys], valid[kKeys];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        slot[k] = cursor.valid(walk.box);
        valid[k] = slot[k];
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) valid[k] = valid[k] & (cursor.at[a] < walk.seen[a]);
        keys[k] = walk.key.at;
        bias[k] = valid[k] & walk.has_bias ? __ldg(walk.bias.at) : A(0);
        cursor.advance(walk.box, walk.key, walk.bias);
      }
      query.dot(keys, valid, product);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        T weight = fill;
        if (valid[k]) narrow(product[k] + bias[k], weight);
        if ((own == k) & slot[k]) *at = weight;
      }
    }
    if (!window) break;
    weights += p.neighborhood.window_size();
    walk = walk_additional<T>(p, steps, item, kv_head, lane);
  }
}

}  // namespace

cudaError_t pn(const PnParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kQueries, p.dim * bytes);
  const bool aligned = rows_aligned(bytes, {p.dim}, {p.queries, p.keys, p.additional_keys});
  return with_layout(p.dtype, p.dim, aligned, [&](auto type, auto layout) {
    using L = decltype(layout);
    return launch_blocks(pn_kernel<typename decltype(type)::Type, L>, blocks_for(geometry.items(), L::kGroups), stream,
                         p, geometry, PnSteps(p));
  });
}

}  // namespace jax_natten::naive
