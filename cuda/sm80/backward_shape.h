// Sizes of the backward kernels: what one CTA holds, for each head dimension and pass.
#pragma once

#include "../common/tiling.h"
#include "forward_shape.h"

namespace jax_natten::sm80 {

// What one pass over the pairs of queries and keys computes: d_query; d_key and d_value; or the gradient of the bias.
enum class Pass { kQueries, kKeys, kBias };

constexpr Walk walk_of(Pass pass) { return pass == Pass::kKeys ? Walk::kQueriesOfKeys : Walk::kKeysOfQueries; }

struct BackwardShape {
  int rows;            // of the tile that stays
  int columns;         // of the tiles that pass by
  int stages;          // of the latter in shared memory
  int splits;          // warps that share their rows, each with its part of the channels of the sums
  int blocks;          // of 16 rows that a warp has: with two, it reads the columns from shared memory half as often
  int chunk;           // columns whose scores a warp holds at a time
  int least_ctas = 2;  // of a multiprocessor, which registers must allow for
  constexpr int warp_rows() const { return 16 * blocks; }
  constexpr int parts() const { return rows / warp_rows(); }
  constexpr int warps() const { return parts() * splits; }
};

constexpr BackwardShape bias_shape(int row_bytes) {
  const int columns = row_bytes <= 384 ? 32 : 16;
  return {row_bytes <= 512 ? 64 : row_bytes <= 768 ? 32 : 16, columns, 1, 1, 1, columns};
}

// float32 as sums of two numbers takes twice the registers for its operands.
constexpr BackwardShape float_shape(int dim, bool keys) {
  if (dim <= 32) return {64, 32, 2, 1, 1, 32};
  if (dim <= 64) return {64, keys ? 16 : 32, 2, 1, 1, keys ? 16 : 32};
  if (dim <= 128) return keys ? BackwardShape{32, 16, 2, 2, 1, 16} : BackwardShape{64, 16, 2, 1, 1, 16};
  return {32, 16, 1, keys ? 2 : 1, 1, 16};
}

// Head dimension 128: sums of two blocks of rows leave registers for 32 columns. Below, more CTAs are worth more.
constexpr BackwardShape half_shape(int dim, bool keys) {
  if (dim <= 32) return {64, 64, 2, 1, 1, 32, keys ? 3 : 4};
  if (dim <= 64) return {64, 64, 2, 1, 1, 32, 3};
  if (dim <= 96) return {64, 64, 2, 1, 1, 32};
  if (dim <= 128) return keys ? BackwardShape{64, 64, 2, 1, 1, 32} : BackwardShape{128, 32, 2, 1, 2, 32};
  if (dim <= 192) return {64, keys ? 16 : 32, 2, 1, 1, keys ? 16 : 32};
  return keys ? BackwardShape{32, 32, 2, 2, 1, 32} : BackwardShape{64, 16, 2, 1, 1, 16};
}

// Chosen so that two tiles that stay and `stages` times two that pass by take at most 96 KB, and that the sums (two for
// the key pass) stay in registers.
constexpr BackwardShape backward_shape(int element_bytes, int dim, Pass pass) {
  if (pass == Pass::kBias) return bias_shape(element_bytes * dim);
  return element_bytes == 4 ? float_shape(dim, pass == Pass::kKeys) : half_shape(dim, pass == Pass::kKeys);
}

}  // namespace jax_natten::sm80
