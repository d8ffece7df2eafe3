// What a kernel is told: plain structs that the FFI handlers fill after they have checked every buffer.
//
// Layouts are row-major. Grid axes X are the three (padded) axes of `neighborhood`, N = X0 * X1 * X2 positions:
//   query            [batch, X, heads, dim]            key               [batch, X, kv_heads, dim]
//   value            [batch, X, kv_heads, value_dim]   out               [batch, X, heads, value_dim]
//   lse              [batch, X, heads]                 (accumulation dtype)
//   additional_keys  [batch, additional, kv_heads, dim]
//   additional_values[batch, additional, kv_heads, value_dim]
//   bias             [bias_batch, heads, 2 K0 - 1, 2 K1 - 1, 2 K2 - 1] (accumulation dtype)
// Query head h reads key and value head h / (heads / kv_heads). Batch element b reads the bias of
// b / (batch / bias_batch). The accumulation dtype is float32, and float64 for float64 inputs.
#pragma once

#include <cstddef>

#include "neighborhood.h"

namespace jax_natten {

enum class DType : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

// How far float32 products may be rounded: kHighest not at all, kHigh to TensorFloat32, kDefault as far as is fastest.
// A kernel may always be more exact. Without a meaning for other dtypes.
enum class Precision : int { kDefault, kHigh, kHighest };

struct FusedShape {
  DType dtype = DType::kFloat32;
  Neighborhood neighborhood;
  int64_t batch = 0;
  int heads = 0, kv_heads = 0;
  int dim = 0, value_dim = 0;
  int additional = 0;      // additional keys that every query sees, 0: none
  int64_t bias_batch = 0;  // 0: no relative position bias
  double scale = 1.0;      // may be zero or negative
  Precision precision = Precision::kHighest;

  JAX_NATTEN_HD int group() const { return heads / kv_heads; }
  JAX_NATTEN_HD bool has_bias() const { return bias_batch > 0; }
};

// Tiles that the caller asks an implementation for, if there are any: numbers whose meaning is that implementation's
// (sm90/plan.h, sm80/plan.h). They live as long as the call.
struct AskedTiles {
  const int64_t* fields = nullptr;
  size_t count = 0;

  bool any() const { return count > 0; }
};

struct FusedForwardParams : FusedShape {
  const void *query, *key, *value, *additional_keys, *additional_values, *bias;
  void *out, *lse;
  AskedTiles sm90_tiles, sm80_tiles;
};

struct FusedBackwardParams : FusedShape {
  const void *query, *key, *value, *additional_keys, *additional_values, *bias;
  const void *out, *lse, *d_out, *d_lse;
  void *d_query, *d_key, *d_value, *d_additional_keys, *d_additional_values, *d_bias;
  // Accumulation dtype, `workspace_size` elements; each implementation lays it out as it likes.
  // jax_natten/primitives/workspace.py reserves it.
  void* workspace;
  int64_t workspace_size;
};

// The three unfused operations (semantics in jax_natten/unfused.py). Slots are the window_size() + additional keys of a
// query: row-major over the window axes, the additional keys last.
//   pointwise-neighborhood PN: weights[x, slot] = <queries_x, keys_slot> (+ bias)
//   neighborhood-neighborhood NN: queries[x] = sum over slots of weights[x, slot] * keys_slot
//   inverse-neighborhood IN: keys[y] = sum over x that see y of weights[x, slot(x, y)] * queries_x
struct UnfusedShape {
  DType dtype = DType::kFloat32;
  Neighborhood neighborhood;
  int64_t batch = 0;
  int heads = 0, kv_heads = 0, dim = 0;
  int additional = 0;
  int64_t bias_batch = 0;               // PN only
  bool fill_negative_infinity = false;  // PN only: what a causal slot past the query holds; else zero
  Precision precision = Precision::kHighest;

  JAX_NATTEN_HD int group() const { return heads / kv_heads; }
  JAX_NATTEN_HD bool has_bias() const { return bias_batch > 0; }
  JAX_NATTEN_HD int64_t slots() const { return neighborhood.window_size() + additional; }
};

struct PnParams : UnfusedShape {
  const void *queries, *keys, *additional_keys, *bias;
  void* weights;  // [batch, X, heads, slots]
};

struct NnParams : UnfusedShape {
  const void *weights, *keys, *additional_keys;
  void* queries;
};

struct InParams : UnfusedShape {
  const void *weights, *queries;
  void *keys, *additional_keys;
  void* workspace;  // accumulation dtype
  int64_t workspace_size;
};

}  // namespace jax_natten
