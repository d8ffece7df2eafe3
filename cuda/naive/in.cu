// Inverse-neighborhood: keys[y] = sum over the queries x that see y of weights[x, slot(x, y)] * queries_x, over all
// query heads of a key head. One group of lanes per key and key head.
//
// Every query sees an additional key. Their queries are cut into chunks, one group of lanes each, whose partial sums
// are added in a second stage.
#include "geometry.h"
#include "launch.h"
#include "naive.h"
#include "partials.cuh"

namespace jax_natten::naive {
namespace {

struct InSteps {
  Steps query, weights;

  explicit InSteps(const InParams& p)
      : query(row_steps(p.neighborhood, int64_t(p.heads) * p.dim)),
        weights(row_steps(p.neighborhood, p.heads * p.slots())) {}
};

// What a group of lanes works on.
struct KeyItem {
  bool valid;
  Box queries;
  Place place;        // of a key of the grid
  int64_t slot;       // of an additional key, the same for all queries
  int64_t query_row;  // row of the first query, for the first of its heads
  int64_t out_row;    // row of the result, or number of the partial sum of an additional key
};

__device__ __forceinline__ KeyItem find_window_key(const InParams& p, const Geometry& geometry, int64_t ordinal) {
  const Item item = geometry.item(ordinal);
  const int64_t first = item.batch * geometry.positions;
  const Box queries = queries_of_key(geometry, item.place);
  return {item.valid,
          item.valid ? queries : empty_box(),
          item.place,
          0,
          (first + queries.origin) * p.heads + int64_t(item.head) * geometry.group.divisor,
          (first + item.place.position) * p.kv_heads + item.head};
}

__device__ __forceinline__ KeyItem find_additional_key(const InParams& p, const Geometry& geometry, int64_t ordinal) {
  const ChunkItem item = find_chunk_item(ordinal, geometry, p.additional, p.kv_heads);
  const int64_t first = item.batch * geometry.positions + item.queries.origin;
  return {item.valid,
          item.valid ? item.queries : empty_box(),
          {},
          p.neighborhood.window_size() + item.additional,
          first * p.heads + int64_t(item.kv_head) * geometry.group.divisor,
          item.valid ? ordinal : 0};
}

// Follows a cursor over the queries of a key: the slot that the key has in a query's row of weights.
struct SlotStream {
  const Geometry& geometry;
  const KeyItem& key;
  bool additional;
  int query;            // in-group index on axis 2
  int64_t outer, slot;  // part of axes 0 and 1, whole

  __device__ __forceinline__ SlotStream(const Geometry& geometry, const KeyItem& key, bool additional)
      : geometry(geometry), key(key), additional(additional) {
    start_row(0, 0);
  }
  __device__ __forceinline__ void next() {
    ++query;
    find();
  }
  __device__ __forceinline__ void jump(const Box&, const Cursor& cursor) { start_row(cursor.at[0], cursor.at[1]); }

 private:
  __device__ __forceinline__ int along(int a, int index) const {
    return key.place.index[a] - geometry.axes[a].window_of_query(index, key.place.length[a]).begin;
  }
  __device__ __forceinline__ void start_row(int at0, int at1) {
    if (additional) {
      slot = key.slot;
      return;
    }
    outer = int64_t(along(0, key.queries.begin[0] + at0)) * geometry.axes[1].axis.window +
            along(1, key.queries.begin[1] + at1);
    outer *= geometry.axes[2].axis.window;
    query = key.queries.begin[2];
    find();
  }
  __device__ __forceinline__ void find() {
    if (!additional) slot = outer + along(2, query);
  }
};

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, L::kMinBlocks)
    in_kernel(const __grid_constant__ InParams p, const __grid_constant__ Geometry geometry,
              const __grid_constant__ InSteps steps, bool additional, int64_t first_block) {
  using A = Accumulator<T>;
  constexpr int kQueries = L::kVectors == 1 ? 4 : 2;
  const int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const Lane<L> lane(p.dim);
  const KeyItem item = additional ? find_additional_key(p, geometry, ordinal) : find_window_key(p, geometry, ordinal);
  const int64_t step = int64_t(additional ? 1 : p.neighborhood.axes[2].dilation) * p.heads;

  // Rows longer than a span take one walk over the queries for each span.
  for (int begin = 0; begin == 0 || (!L::kWhole && begin < p.dim); begin += L::kSpan) {
    Fragment<T, L> total;
    for (int member = 0; member < geometry.group.divisor; ++member) {
      const int64_t row = item.query_row + member;
      Stream<T> query(static_cast<const T*>(p.queries) + row * p.dim + lane.first, step * p.dim, steps.query.outer);
      Stream<T> weights(static_cast<const T*>(p.weights) + row * p.slots(), step * p.slots(), steps.weights.outer);
      SlotStream slot(geometry, item, additional);
      Cursor cursor;
      while (__any_sync(kFullWarp, cursor.valid(item.queries))) {
        Stored<T, L> queries[kQueries];
        A weight[kQueries];
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const bool valid = cursor.valid(item.queries);
          queries[q] = load<T, L>(query.at, lane, begin, valid);
          weight[q] = 0;
          if (valid) weight[q] = load_one(weights.at + slot.slot);
          cursor.advance(item.queries, query, weights, slot);
        }
        Sum<T, L> sum(total);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) sum.add(weight[q], queries[q]);
        sum.finish();
      }
    }
    if (!item.valid) continue;
    if (additional) {
      store_partial<T>(static_cast<A*>(p.workspace) + item.out_row * p.dim + lane.first, lane, total, begin);
    } else {
      store<T, L>(static_cast<T*>(p.keys) + item.out_row * p.dim + lane.first, lane, total, begin);
    }
  }
}

}  // namespace

cudaError_t in(const InParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kKeys, p.dim * bytes);
  const InSteps steps(p);
  const int64_t rows = int64_t(p.additional) * p.kv_heads;
  if (p.batch == 0) return cudaSuccess;
  if (geometry.positions == 0) {
    const int64_t size = p.batch * rows * p.dim * bytes;
    return size > 0 ? cudaMemsetAsync(p.additional_keys, 0, size, stream) : cudaSuccess;
  }
  const bool aligned = rows_aligned(bytes, {p.dim}, {p.queries, p.keys});
  return with_layout(p.dtype, p.dim, aligned, [&](auto type, auto layout) {
    using T = typename decltype(type)::Type;
    using L = decltype(layout);
    const auto kernel = in_kernel<T, L>;
    if (auto error =
            launch_blocks(kernel, blocks_for(geometry.items(), L::kGroups), stream, p, geometry, steps, false)) {
      return error;
    }
    if (rows == 0) return cudaSuccess;
    const int64_t chunks = reduction_chunks(geometry.positions);
    if (auto error =
            launch_blocks(kernel, blocks_for(p.batch * chunks * rows, L::kGroups), stream, p, geometry, steps, true)) {
      return error;
    }
    return sum_partials<T>(static_cast<const Accumulator<T>*>(p.workspace), p.additional_keys,
                           {p.batch, chunks, rows, p.dim, 0, p.dim}, stream);
  });
}

}  // namespace jax_natten::naive
