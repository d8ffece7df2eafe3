// Sizes of the backward kernels: what one CTA holds, for each head dimension and pass.
#pragma once

#include "../common/tiling.h"
#include "forward_shape.h"

namespace jax_natten::sm80 {

// What one pass over the pairs of queries and keys computes: d_query; d_key and d_value; or the gradient of the bias.
enum class Pass { kQueries, kKeys, kBias };

constexpr Walk walk_of(Pass pass) { return pass == Pass::kKeys ? Walk::kQueriesOfKeys : Walk::kKeysOfQueries; }

struct BackwardShape {
  int rows;     // of the tile that stays
  int columns;  // of the tiles that pass by
  int stages;   // of the latter in shared memory
  int splits;   // warps that share 16 rows, each with its part of the channels of the sums
  constexpr int warps() const { return rows / 16 * splits; }
};

// Chosen so that two tiles that stay and `stages` times two that pass by take at most 96 KB, and that the sums (two for
// the key pass) stay in registers.
constexpr BackwardShape backward_shape(int element_bytes, int dim, Pass pass) {
  const int row_bytes = element_bytes * dim;
  const bool keys = pass == Pass::kKeys;
  if (pass == Pass::kBias) {
    return {row_bytes <= 512 ? 64 : row_bytes <= 768 ? 32 : 16, row_bytes <= 384 ? 32 : 16, 1, 1};
  }
  // float32 as sums of two numbers takes twice the registers for its operands.
  const bool wide = element_bytes == 4;
  if (row_bytes <= 128) return {64, wide ? 32 : 64, 2, 1};
  if (row_bytes <= 256) return {64, keys && wide ? 16 : keys || wide ? 32 : 64, 2, 1};
  if (row_bytes <= 384) return {64, keys ? 16 : 32, 2, 1};
  if (row_bytes <= 512) return keys ? BackwardShape{32, wide ? 16 : 32, 2, 2} : BackwardShape{64, 16, 2, 1};
  if (row_bytes <= 768) return {32, 16, 2, keys ? 2 : 1};
  return {32, 16, 1, keys ? 2 : 1};
}

}  // namespace jax_natten::sm80
