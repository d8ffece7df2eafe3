// What the extended variants of the sm_90 kernels are told beyond a plain problem: additional keys, which every query
// sees, and a relative position bias. Each may be missing.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../common/fast_division.h"
#include "../common/tiling.h"

namespace jax_natten::sm90 {

struct KeyExtension {
  int additional = 0;  // keys
  int box = 0;         // of those, keys that are loaded together
  int per_batch = 0;   // slabs of the maps below, one per batch element and head
  CUtensorMap key, value;

  const float* bias = nullptr;   // [bias_batch, heads, 2 K0 - 1, 2 K1 - 1, 2 K2 - 1]
  FastDivisor by_table;          // batch elements that share a table
  int heads;                     // of the problem
  int64_t bias_size;             // entries of a head
  int bias_step[kMaxRank] = {};  // entries between neighboring columns of an axis: keys, or queries (negative)
  int bias_center;               // entry of a query's own position
  float score_scale;             // scores are multiplied by it before the bias is added: in powers of two

  // Entries of a head for the query at in-group position (0, 0, 0), at the entry of the key there. Other columns are
  // steps ahead, other rows steps back.
  JAX_NATTEN_HD const float* entries(int batch, int head) const {
    return bias + (int64_t(by_table.quotient(batch)) * heads + head) * bias_size + bias_center;
  }
};

// Walks over the key tiles of a query tile's window box and then over boxes of additional keys.
template <int kRank, bool kExtended>
struct KeyCursor : KeyTileCursor<kRank> {
  int additional = -1;  // first additional key of the box; -1: still in the window box

  JAX_NATTEN_HD bool in_window() const { return !kExtended || additional < 0; }

  JAX_NATTEN_HD bool next(const TiledAxis* axes, const int* extent, const KeyExtension& extension) {
    if (in_window()) {
      if (KeyTileCursor<kRank>::next(axes, extent)) return true;
      if (!kExtended) return false;
      additional = 0;
    } else {
      additional += extension.box;
    }
    return additional < extension.additional;
  }
};

}  // namespace jax_natten::sm90
