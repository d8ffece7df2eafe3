// Fused backward, bias pass: d_bias[distance] = sum of dS over the pairs of a query and a key that far apart.
//
// One entry of the table gets its terms from many queries, and may have only one writer. On every axis, the keys of a
// window lie at K consecutive distances of the 2 K - 1 possible, so exactly one of them at each remainder modulo K. A
// group of lanes takes one remainder (one per axis), for a chunk of the queries: one pair per query, and entries of the
// chunk's partial table that are its own. Partial tables are added in a second stage.
#include "fused_backward.h"
#include "keys.cuh"
#include "launch.h"
#include "partials.cuh"

namespace jax_natten::naive {
namespace {

// Compensated summation (Kahan): an entry has very many terms.
template <typename A>
struct LongSum {
  A sum = 0, lost = 0;

  __device__ __forceinline__ void add(A term) {
    const A corrected = term - lost;
    const A next = sum + corrected;
    lost = (next - sum) - corrected;
    sum = next;
  }
};

template <typename T, class L>
__device__ __forceinline__ Accumulator<T> row_product(const T* x, const T* y, const Lane<L>& lane, bool valid) {
  Accumulator<T> product = 0;
#pragma unroll 1
  for (int begin = 0; begin == 0 || (!L::kWhole && begin < lane.size); begin += L::kSpan) {
    const Fragment<T, L> wide = widen<T, L>(load<T, L>(x + lane.first, lane, begin, valid));
    product = partial_dot<T, L>(wide, load<T, L>(y + lane.first, lane, begin, valid), product);
  }
  return group_sum<L>(product);
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, L::kMinBlocks)
    backward_bias_kernel(const __grid_constant__ FusedBackwardParams p, const __grid_constant__ Geometry geometry,
                         int64_t first_block) {
  using A = Accumulator<T>;
  const Neighborhood& window = p.neighborhood;
  const int64_t positions = geometry.positions, table_size = window.bias_size();
  const Lane<L> key_lane(p.dim), value_lane(p.value_dim);
  const A scale = static_cast<A>(p.scale);

  int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const bool valid = ordinal < reduction_chunks(positions) * p.bias_batch * p.heads * window.window_size();
  ordinal = valid ? ordinal : 0;
  int remainder[kMaxRank];
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    remainder[a] = int(ordinal % window.axes[a].window);
    ordinal /= window.axes[a].window;
  }
  A* const partial = static_cast<A*>(p.workspace) + bias_partials(p) + ordinal * table_size;
  const int head = int(ordinal % p.heads);
  ordinal /= p.heads;
  const int64_t share = geometry.bias_share.divisor, first_batch = ordinal % p.bias_batch * share;
  const int chunk = int(ordinal / p.bias_batch);
  const int kv_head = geometry.group.quotient(head);

  const bool writes = valid && key_lane.first == 0;
  if (writes) {
    for (int corner = 0; corner < 1 << kMaxRank; ++corner) {
      int64_t entry = 0;
      bool inside = true;
      for (int a = 0; a < kMaxRank; ++a) {
        const int size = window.axes[a].window, distance = remainder[a] + (corner >> a & 1) * size;
        inside = inside && distance < 2 * size - 1;
        entry = entry * (2 * int64_t(size) - 1) + distance;
      }
      if (inside) partial[entry] = 0;
    }
  }

  const int64_t end = valid ? chunk_begin(positions, chunk + 1) : 0;
  LongSum<A> sum;
  int64_t entry = -1;
  for (int64_t position = chunk_begin(positions, chunk); __any_sync(kFullWarp, position < end); ++position) {
    const bool in_chunk = position < end;
    const Place query = geometry.place(in_chunk ? position : 0);
    Pair pair = pair_at(geometry, window, query, remainder);
    pair.valid = pair.valid & in_chunk;
    if (pair.valid && pair.entry != entry) {
      if (writes && entry >= 0) partial[entry] += sum.sum;
      entry = pair.entry;
      sum = LongSum<A>();
    }
    const A bias =
        pair.valid ? static_cast<const A*>(p.bias)[(ordinal % p.bias_batch * p.heads + head) * table_size + pair.entry]
                   : A(0);
    for (int64_t batch = first_batch; batch < first_batch + share; ++batch) {
      const int64_t row = (batch * positions + query.position) * p.heads + head;
      const int64_t key_row = (batch * positions + (pair.valid ? pair.key : 0)) * p.kv_heads + kv_head;
      const A score = row_product<T, L>(static_cast<const T*>(p.query) + row * p.dim,
                                        static_cast<const T*>(p.key) + key_row * p.dim, key_lane, pair.valid);
      const A d_probability =
          row_product<T, L>(static_cast<const T*>(p.d_out) + row * p.value_dim,
                            static_cast<const T*>(p.value) + key_row * p.value_dim, value_lane, pair.valid);
      if (pair.valid) {
        const A probability = exponential<T>(fma(scale, score, bias) - static_cast<const A*>(p.lse)[row]);
        sum.add(probability * (d_probability - static_cast<const A*>(p.workspace)[row]));
      }
    }
  }
  if (writes && entry >= 0) partial[entry] += sum.sum;
}

}  // namespace

cudaError_t backward_of_bias(const FusedBackwardParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kQueries, p.dim * bytes);
  const bool aligned = rows_aligned(bytes, {p.dim, p.value_dim}, {p.query, p.key, p.value, p.d_out});
  const int64_t chunks = reduction_chunks(geometry.positions), size = bias_gradient_size(p);
  const int64_t items = chunks * p.bias_batch * p.heads * p.neighborhood.window_size();
  return with_layout(p.dtype, std::max(p.dim, p.value_dim), aligned, [&](auto type, auto layout) {
    using T = typename decltype(type)::Type;
    using A = Accumulator<T>;
    using L = decltype(layout);
    if (auto error = launch_blocks(backward_bias_kernel<T, L>, blocks_for(items, L::kGroups), stream, p, geometry)) {
      return error;
    }
    return sum_partials<A>(static_cast<const A*>(p.workspace) + bias_partials(p), p.d_bias, {1, chunks, size, 1, 0, 1},
                           stream);
  });
}

}  // namespace jax_natten::naive
