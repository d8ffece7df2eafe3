// Fused backward, key pass: d_key and d_value, and the same of the additional keys. One group of lanes per key and key
// head; it walks the queries that see the key, head by head of the key head's query heads.
//
// Every query sees an additional key. Their queries are cut into chunks, one group of lanes each, whose partial sums
// are added in a second stage.
#include "fused_backward.h"
#include "keys.cuh"
#include "launch.h"
#include "partials.cuh"

namespace jax_natten::naive {
namespace {

// Outer steps of the arrays that a walk over queries follows.
struct QuerySteps {
  Steps query, d_out, lse, bias;

  explicit QuerySteps(const FusedShape& p)
      : query(row_steps(p.neighborhood, int64_t(p.heads) * p.dim)),
        d_out(row_steps(p.neighborhood, int64_t(p.heads) * p.value_dim)),
        lse(row_steps(p.neighborhood, p.heads)),
        bias(bias_steps(p.neighborhood, -1)) {}
};

// What a group of lanes works on.
struct KeyItem {
  bool valid;
  Box queries;
  int64_t key_row;     // row of the key and its value
  int64_t out_row;     // row of the results: the same, or the number of the partial sum of an additional key
  int64_t query_row;   // row of the first query, for the first of its heads
  int64_t bias_entry;  // entry of the bias of that query and head
};

__device__ __forceinline__ KeyItem find_window_key(const FusedBackwardParams& p, const Geometry& geometry,
                                                   int64_t ordinal) {
  const Item item = geometry.item(ordinal);
  const int64_t first = item.batch * geometry.positions;
  const int first_head = item.head * geometry.group.divisor;
  KeyItem key = {item.valid, queries_of_key(geometry, item.place), 0, 0, 0, 0};
  key.key_row = key.out_row = (first + item.place.position) * p.kv_heads + item.head;
  key.query_row = (first + key.queries.origin) * p.heads + first_head;
  if (p.has_bias()) {
    key.bias_entry = bias_table(p.neighborhood, geometry, item.batch, first_head, p.heads) +
                     bias_index(p.neighborhood, key.queries.begin, item.place.index);
  }
  return key;
}

__device__ __forceinline__ KeyItem find_additional_key(const FusedBackwardParams& p, const Geometry& geometry,
                                                       int64_t ordinal) {
  const ChunkItem item = find_chunk_item(ordinal, geometry, p.additional, p.kv_heads);
  const int64_t first = item.batch * geometry.positions + item.queries.origin;
  return {item.valid,
          item.queries,
          (item.batch * p.additional + item.additional) * p.kv_heads + item.kv_head,
          item.valid ? ordinal : 0,
          first * p.heads + int64_t(item.kv_head) * geometry.group.divisor,
          0};
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads, 3)
    backward_key_kernel(const __grid_constant__ FusedBackwardParams p, const __grid_constant__ Geometry geometry,
                        const __grid_constant__ QuerySteps steps, bool additional, int64_t first_block) {
  using A = Accumulator<T>;
  constexpr int kQueries = L::kWhole ? 2 : 1;
  const int64_t ordinal = (first_block + blockIdx.x) * L::kGroups + threadIdx.x / L::kLanes;
  const Lane<L> key_lane(p.dim), value_lane(p.value_dim);
  const A scale = static_cast<A>(p.scale);

  const KeyItem item = additional ? find_additional_key(p, geometry, ordinal) : find_window_key(p, geometry, ordinal);
  const Row<T, L> key(static_cast<const T*>(additional ? p.additional_keys : p.key) + item.key_row * p.dim, key_lane);
  const Row<T, L> value(static_cast<const T*>(additional ? p.additional_values : p.value) + item.key_row * p.value_dim,
                        value_lane);
  const Box queries = item.valid ? item.queries : empty_box();
  const int64_t step = int64_t(additional ? 1 : p.neighborhood.axes[2].dilation) * p.heads;
  const bool has_bias = p.has_bias() & !additional;
  // From the LSE of a query to its delta: one stream serves both.
  const int64_t to_delta = static_cast<const A*>(p.workspace) - static_cast<const A*>(p.lse);

  // Rows longer than a span take one walk over the queries for each span.
  for (int begin = 0; begin == 0 || (!L::kWhole && begin < imax(p.dim, p.value_dim)); begin += L::kSpan) {
    Fragment<T, L> d_key, d_value;
    for (int member = 0; member < geometry.group.divisor; ++member) {
      const int64_t row = item.query_row + member;
      Stream<T> query(static_cast<const T*>(p.query) + row * p.dim + key_lane.first, step * p.dim, steps.query.outer);
      Stream<T> d_out(static_cast<const T*>(p.d_out) + row * p.value_dim + value_lane.first, step * p.value_dim,
                      steps.d_out.outer);
      Stream<A> lse(static_cast<const A*>(p.lse) + row, step, steps.lse.outer);
      Stream<A> bias(static_cast<const A*>(p.bias) + item.bias_entry + member * p.neighborhood.bias_size(), -1,
                     steps.bias.outer);
      Cursor cursor;
      while (__any_sync(kFullWarp, cursor.valid(queries))) {
        const T *query_rows[kQueries], *d_out_rows[kQueries];
        A lses[kQueries], deltas[kQueries], biases[kQueries];
        bool valid[kQueries];
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          valid[q] = cursor.valid(queries);
          query_rows[q] = query.at;
          d_out_rows[q] = d_out.at;
          lses[q] = valid[q] ? __ldg(lse.at) : A(0);
          deltas[q] = valid[q] ? __ldg(lse.at + to_delta) : A(0);
          biases[q] = valid[q] & has_bias ? __ldg(bias.at) : A(0);
          cursor.advance(queries, query, d_out, lse, bias);
        }
        A score[kQueries], d_probability[kQueries];
        Stored<T, L> query_spans[kQueries], d_out_spans[kQueries];
        key.dot(query_rows, valid, score, query_spans);
        value.dot(d_out_rows, valid, d_probability, d_out_spans);
        keep_span<T, L>(query_rows, valid, key_lane, begin, query_spans);
        keep_span<T, L>(d_out_rows, valid, value_lane, begin, d_out_spans);
        Sum<T, L> step_key(d_key), step_value(d_value);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const A probability = valid[q] ? exponential<T>(fma(scale, score[q], biases[q]) - lses[q]) : A(0);
          const A d_score = valid[q] ? probability * (d_probability[q] - deltas[q]) : A(0);
          step_value.add(probability, d_out_spans[q]);
          step_key.add(d_score, query_spans[q]);
        }
        step_key.finish();
        step_value.finish();
      }
    }
    if (!item.valid) continue;
#pragma unroll
    for (int e = 0; e < L::kElements; ++e) d_key.element[e] *= scale;
    if (additional) {
      A* const partial =
          static_cast<A*>(p.workspace) + additional_partials(p) + item.out_row * (int64_t(p.dim) + p.value_dim);
      store_partial<T>(partial + key_lane.first, key_lane, d_key, begin);
      store_partial<T>(partial + p.dim + value_lane.first, value_lane, d_value, begin);
    } else {
      store<T, L>(static_cast<T*>(p.d_key) + item.out_row * p.dim + key_lane.first, key_lane, d_key, begin);
      store<T, L>(static_cast<T*>(p.d_value) + item.out_row * p.value_dim + value_lane.first, value_lane, d_value,
                  begin);
    }
  }
}

}  // namespace

cudaError_t backward_of_keys(const FusedBackwardParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const Geometry geometry(p, Items::kKeys, p.dim * bytes);
  const QuerySteps steps(p);
  const bool aligned =
      rows_aligned(bytes, {p.dim, p.value_dim},
                   {p.query, p.key, p.value, p.additional_keys, p.additional_values, p.d_out, p.d_key, p.d_value});
  return with_layout(p.dtype, std::max(p.dim, p.value_dim), aligned, [&](auto type, auto layout) {
    using T = typename decltype(type)::Type;
    using L = decltype(layout);
    const auto kernel = backward_key_kernel<T, L>;
    if (auto error =
            launch_blocks(kernel, blocks_for(geometry.items(), L::kGroups), stream, p, geometry, steps, false)) {
      return error;
    }
    const int64_t chunks = reduction_chunks(geometry.positions), rows = int64_t(p.additional) * p.kv_heads;
    if (rows == 0) return cudaSuccess;
    if (auto error =
            launch_blocks(kernel, blocks_for(p.batch * chunks * rows, L::kGroups), stream, p, geometry, steps, true)) {
      return error;
    }
    const int64_t width = int64_t(p.dim) + p.value_dim;
    const Accumulator<T>* partials = static_cast<const Accumulator<T>*>(p.workspace) + additional_partials(p);
    if (auto error = sum_partials<T>(partials, p.d_additional_keys, {p.batch, chunks, rows, width, 0, p.dim}, stream)) {
      return error;
    }
    return sum_partials<T>(partials, p.d_additional_values, {p.batch, chunks, rows, width, p.dim, p.value_dim}, stream);
  });
}

}  // namespace jax_natten::naive
