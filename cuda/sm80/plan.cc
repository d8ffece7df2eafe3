#include "plan.h"

#include <algorithm>
#include <cstdint>

#include "../common/remembered.h"
#include "factorisations.h"

namespace jax_natten::sm80 {
namespace {

constexpr int kPowers = 8;  // tiles have 1, 2, .. 128 positions along an axis

// Keys that a run of queries in the middle of an axis sees.
int keys_of_run(const Axis& axis, int queries) {
  const int blocks = (queries + axis.stride - 1) / axis.stride;
  return std::min(axis.window + (blocks - 1) * axis.stride + (axis.causal ? axis.stride : 0), group_length(axis, 0));
}

// Costs of an axis, looked up by the binary logarithms of tile sizes.
struct AxisCosts {
  double tiles[kPowers];              // query tiles, in units of whole ones
  double visited[kPowers][kPowers];   // key tiles of a query tile
  double computed[kPowers][kPowers];  // key tiles of a part, on average over where it lies in its query tile

  explicit AxisCosts(const Axis& axis) {
    const int length = group_length(axis, 0);
    for (int q = 0; q < kPowers; ++q) {
      tiles[q] = double((length + (1 << q) - 1) >> q) * (1 << q) / length;
      const int keys = keys_of_run(axis, std::min(1 << q, length));
      for (int k = 0; k < kPowers; ++k) {
        visited[q][k] = (keys + (1 << k) - 1) >> k;
        computed[q][k] = std::min(visited[q][k], double(keys - 1) / (1 << k) + 1);
      }
    }
  }
};

// Everything that the choice of tiles depends on: neither sizes of the batch nor the number of heads.
ProblemKey key_of(const Neighborhood& neighborhood, const TileLimits& limits) {
  ProblemKey key = {neighborhood.rank, limits.warps, limits.queries, limits.keys};
  for (const Axis& axis : neighborhood.axes) {
    key.insert(key.end(), {axis.length, axis.window, axis.stride, axis.dilation, axis.causal});
  }
  return key;
}

Plan search_tiles(const Neighborhood& neighborhood, const TileLimits& limits) {
  const Axis* axes = neighborhood.axes;
  const AxisCosts costs[kMaxRank] = {AxisCosts(axes[0]), AxisCosts(axes[1]), AxisCosts(axes[2])};
  const int first = kMaxRank - neighborhood.rank;
  double best = -1;
  Plan plan;
  plan.rows = limits.warps * limits.queries;
  for_each_factorisation(log2_of(limits.queries), first, [&](const int (&part)[kMaxRank]) {
    for_each_factorisation(log2_of(limits.warps), first, [&](const int (&warps)[kMaxRank]) {
      for_each_factorisation(log2_of(limits.keys), first, [&](const int (&keys)[kMaxRank]) {
        double tiles = 1, visited = 1, computed = 1;
        for (int a = 0; a < kMaxRank; ++a) {
          const int tile = part[a] + warps[a];
          tiles *= costs[a].tiles[tile];
          visited *= costs[a].visited[tile][keys[a]];
          computed *= warps[a] == 0 ? costs[a].visited[tile][keys[a]] : costs[a].computed[part[a]][keys[a]];
        }
        const double cost = tiles * (std::min(computed, visited) + kTileCopyCost * visited);
        if (best >= 0 && cost >= best) return;
        best = cost;
        for (int a = 0; a < kMaxRank; ++a) {
          plan.query_part[a] = 1 << part[a];
          plan.query_tile[a] = 1 << (part[a] + warps[a]);
          plan.key_tile[a] = 1 << keys[a];
        }
      });
    });
  });
  return plan;
}

}  // namespace

std::array<int64_t, kPlanFields> encode_plan(const Plan& plan) {
  const int *q = plan.query_tile, *p = plan.query_part, *k = plan.key_tile;
  return {int(plan.structure), plan.rows, q[0], q[1], q[2], p[0], p[1], p[2], k[0], k[1], k[2]};
}

const char* decode_plan(const AskedTiles& tiles, Plan& plan) {
  const int64_t* const fields = tiles.fields;
  if (tiles.count != kPlanFields) return "tiles must have 11 numbers";
  if (fields[0] < 0 || fields[0] > int(Structure::kSmall)) return "tiles have no such structure";
  for (size_t n = 1; n < tiles.count; ++n) {
    if (fields[n] < 1 || fields[n] > 128) return "tiles must hold numbers from 1 to 128";
  }
  plan.structure = Structure(fields[0]);
  plan.rows = int(fields[1]);
  for (int a = 0; a < kMaxRank; ++a) {
    plan.query_tile[a] = int(fields[2 + a]);
    plan.query_part[a] = int(fields[2 + kMaxRank + a]);
    plan.key_tile[a] = int(fields[2 + 2 * kMaxRank + a]);
  }
  return nullptr;
}

const char* why_not_tiles(const FusedShape& shape, const Plan& plan, const TileLimits& limits) {
  int64_t tiles = shape.batch * shape.heads;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    if (plan.query_part[a] < 1 || plan.key_tile[a] < 1 || plan.query_tile[a] < 1 ||
        plan.query_tile[a] % plan.query_part[a] != 0) {
      return "query tiles must be divided into equal parts";
    }
    if (a < kMaxRank - shape.neighborhood.rank && plan.query_tile[a] * plan.key_tile[a] != 1) {
      return "axes that the problem does not have must have tiles of 1";
    }
    tiles *= (group_length(axis, 0) + plan.query_tile[a] - 1) / plan.query_tile[a] * int64_t(axis.dilation);
  }
  if (product(plan.query_tile) != limits.warps * product(plan.query_part)) {
    return "query tiles must have a part for each warp";
  }
  if (product(plan.query_part) > limits.queries) return "parts have too many queries for these rows";
  if (product(plan.key_tile) > limits.keys) return "key tiles have too many keys";
  if (tiles > INT32_MAX) return "has too many tiles";
  return nullptr;
}

Plan choose_tiles(const FusedShape& shape, const TileLimits& limits) {
  static Remembered<Plan> known;
  return known.find(key_of(shape.neighborhood, limits), [&] { return search_tiles(shape.neighborhood, limits); });
}

}  // namespace jax_natten::sm80
