// Walks over the keys of a query.
#pragma once

#include "../common/params.h"
#include "geometry.h"
#include "rows.cuh"

namespace jax_natten::naive {

// First entry of the bias table of a batch element and head.
__device__ __forceinline__ int64_t bias_table(const Neighborhood& window, const Geometry& geometry, int64_t batch,
                                              int head, int heads) {
  geometry.bias_share.divide(batch);
  return (batch * heads + head) * window.bias_size();
}

// Outer steps of the arrays that a walk over keys follows.
struct KeySteps {
  Steps key, value, bias;

  explicit KeySteps(const FusedShape& p)
      : key(row_steps(p.neighborhood, int64_t(p.kv_heads) * p.dim)),
        value(row_steps(p.neighborhood, int64_t(p.kv_heads) * p.value_dim)),
        bias(bias_steps(p.neighborhood, 1)) {}
};

// Keys and values of one query of fused attention: those of its window, or the additional ones.
template <typename T, class L>
struct KeyWalk {
  Box box;
  Cursor cursor;
  Stream<T> key, value;  // at this lane's first pack
  Stream<Accumulator<T>> bias;
  bool has_bias;

  __device__ __forceinline__ bool valid() const { return cursor.valid(box); }
  __device__ __forceinline__ void advance() { cursor.advance(box, key, value, bias); }
  __device__ __forceinline__ Accumulator<T> bias_or_zero() const {
    return has_bias & valid() ? __ldg(bias.at) : Accumulator<T>(0);
  }
};

// Row of `rows` [batch, positions, kv_heads, size] that holds the first key of the box, at this lane's first pack.
template <typename T, class L>
__device__ __forceinline__ const T* first_row(const void* rows, int64_t positions, int kv_heads, int64_t batch,
                                              int kv_head, const Box& box, const Lane<L>& lane) {
  return static_cast<const T*>(rows) + ((batch * positions + box.origin) * kv_heads + kv_head) * lane.size + lane.first;
}

// Bias of the query and its first key.
template <typename T, class Params>
__device__ __forceinline__ const Accumulator<T>* first_bias(const Params& p, const Geometry& geometry, const Item& item,
                                                            const Box& keys) {
  const Accumulator<T>* bias = static_cast<const Accumulator<T>*>(p.bias);
  if (!p.has_bias()) return bias;
  return bias + bias_table(p.neighborhood, geometry, item.batch, item.head, p.heads) +
         bias_index(p.neighborhood, item.place.index, keys.begin);
}

template <typename T, class L, class Params>
__device__ __forceinline__ KeyWalk<T, L> walk_window(const Params& p, const Geometry& geometry, const KeySteps& steps,
                                                     const Item& item, const Lane<L>& key_lane,
                                                     const Lane<L>& value_lane) {
  const Box box = keys_of_query(geometry, item.place);
  const int64_t positions = geometry.positions;
  const int kv_head = geometry.group.quotient(item.head);
  const int64_t step = int64_t(p.neighborhood.axes[2].dilation) * p.kv_heads;
  return {
      item.valid ? box : empty_box(),
      Cursor(),
      {first_row<T>(p.key, positions, p.kv_heads, item.batch, kv_head, box, key_lane), step * p.dim, steps.key.outer},
      {first_row<T>(p.value, positions, p.kv_heads, item.batch, kv_head, box, value_lane), step * p.value_dim,
       steps.value.outer},
      {first_bias<T>(p, geometry, item, box), 1, steps.bias.outer},
      p.has_bias()};
}

template <typename T, class L, class Params>
__device__ __forceinline__ KeyWalk<T, L> walk_additional(const Params& p, const Geometry& geometry,
                                                         const KeySteps& steps, const Item& item,
                                                         const Lane<L>& key_lane, const Lane<L>& value_lane) {
  const Box box = linear_box(0, item.valid ? p.additional : 0);
  const int kv_head = geometry.group.quotient(item.head);
  const int64_t step = p.kv_heads;
  return {box,
          Cursor(),
          {first_row<T>(p.additional_keys, p.additional, p.kv_heads, item.batch, kv_head, box, key_lane), step * p.dim,
           steps.key.outer},
          {first_row<T>(p.additional_values, p.additional, p.kv_heads, item.batch, kv_head, box, value_lane),
           step * p.value_dim, steps.value.outer},
          {nullptr, 1, steps.bias.outer},
          false};
}

}  // namespace jax_natten::naive
