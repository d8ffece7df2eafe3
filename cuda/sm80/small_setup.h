// Host side shared by the kernels for small windows: their tiles, and the boxes of columns that tiles see. In the key
// pass of the backward (Walk::kQueriesOfKeys) read key for query and query for key, as in ../common/tiling.h.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "../common/tile_model.h"
#include "../common/tiling.h"
#include "factorisations.h"
#include "plan.h"
#include "small_params.h"
#include "small_shape.h"

namespace jax_natten::sm80 {

// Why no kernel for small windows takes a problem; nullptr if one may.
const char* why_not_any_small(const FusedShape& shape);

// The compiled head dimension.
int small_dim(const FusedShape& shape);

// The tiles of kernels for small windows.
constexpr TileLimits kSmallTiles = {kSmallWarps, kSmallRows / kSmallWarps, INT32_MAX};

// Keys that a CTA's or a warp's queries see at most along each axis.
void find_box(const FusedShape& shape, const int (&queries)[kMaxRank], Walk walk, int (&box)[kMaxRank]);

// Of one array, in shared memory.
int bytes_of_box(const FusedShape& shape, const int (&box)[kMaxRank]);

// What kernels are told about a box.
void set_up_box(const FusedShape& shape, const int (&sides)[kMaxRank], SmallBox& box);

// The cheapest plan; false if there is none. cost(plan, list, box): of a tile whose warps' queries see at most `list`
// keys along each axis, and all of whose queries see at most `box`; negative if it does not fit.
template <typename Cost>
bool search_small(const FusedShape& shape, Walk walk, Cost cost, Plan& plan) {
  const int first = kMaxRank - shape.neighborhood.rank;
  constexpr int kLogQueries = 4, kLogTile = 6;
  static_assert(1 << kLogTile == kSmallRows && kSmallRows >> kLogQueries == kSmallWarps, "of a warp, and of a CTA");
  int seen[kMaxRank][kLogTile + 1];  // keys that 2^n queries see
  double tiles[kMaxRank][kLogTile + 1];
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    const int length = group_length(axis, 0);
    for (int n = 0; n <= (a < first ? 0 : kLogTile); ++n) {
      seen[a][n] = most_keys_of_queries(axis, 1 << n, walk);
      tiles[a][n] = double((length + (1 << n) - 1) >> n) * (1 << n) / length;
    }
  }
  double best = -1;
  for_each_factorisation(kLogQueries, first, [&](const int (&part)[kMaxRank]) {
    for_each_factorisation(log2_of(kSmallWarps), first, [&](const int (&warps)[kMaxRank]) {
      Plan candidate;
      candidate.structure = Structure::kSmall;
      candidate.rows = kSmallRows;
      int list[kMaxRank], box[kMaxRank];
      double waste = 1;
      for (int a = 0; a < kMaxRank; ++a) {
        candidate.query_part[a] = 1 << part[a];
        candidate.query_tile[a] = 1 << (part[a] + warps[a]);
        list[a] = seen[a][part[a]];
        box[a] = seen[a][part[a] + warps[a]];
        waste *= tiles[a][part[a] + warps[a]];
      }
      const double of_tile = cost(candidate, list, box), all = waste * of_tile;
      if (of_tile < 0 || (best >= 0 && all >= best)) return;
      best = all;
      plan = candidate;
    });
  });
  return best >= 0;
}

}  // namespace jax_natten::sm80
