#include "forward_rank.h"

#include <algorithm>
#include <cstddef>

#include "../common/tile_search.h"
#include "factorisations.h"
#include "forward_plan.h"
#include "limits.h"
#include "small_plan.h"
#include "small_setup.h"
#include "small_shape.h"

namespace jax_natten::sm80 {
namespace {

// A mask takes about as long as a tenth of the tile, as in the kernels for Hopper (../sm90/cost.cc).
constexpr double kMaskCost = 0.1;

// Of key tiles of as many pairs, in pairs. Warps whose part lies past the end of the grid wait for the others.
double cost_of_tiles(const TileCounts& counts, int warps, double pairs) {
  const double waiting = counts.query_tiles * warps / counts.parts;
  return pairs * (waiting * (counts.computed + kMaskCost * counts.masked) + warps * kTileCopyCost * counts.visited);
}

// Of one head of one batch element.
PlanWork count_small(const FusedShape& shape, const Plan& plan) {
  int list[kMaxRank], box[kMaxRank];
  find_box(shape, plan.query_part, Walk::kKeysOfQueries, list);
  find_box(shape, plan.query_tile, Walk::kKeysOfQueries, box);
  PlanWork work;
  work.tiles = count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, box, /*padded=*/false);
  work.computed_pairs = work.tiles.computed * kSmallTiles.queries * small_list(product(list));
  work.cost = work.tiles.query_tiles * kSmallRows * cost_of_small_tile(list, box);
  return work;
}

PlanWork count_tiled(const FusedShape& shape, const Plan& plan) {
  const TileLimits limits = forward_limits(shape, plan.rows);
  const bool padded = product(plan.key_tile) < limits.keys;
  PlanWork work;
  work.tiles = count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, plan.key_tile, padded);
  const double pairs = double(limits.queries) * limits.keys;
  work.computed_pairs = work.tiles.computed * pairs;
  work.cost = cost_of_tiles(work.tiles, limits.warps, pairs);
  return work;
}

struct Candidate {
  Plan plan;
  double score;
};

// Finds the cheapest plans of one kernel.
class Search {
 public:
  Search(const FusedShape& shape, size_t count)
      : shape_(shape), counts_(shape.neighborhood.axes, Walk::kKeysOfQueries), count_(count), best_(count) {}

  std::vector<Candidate> small() {
    Plan plan;
    plan.structure = Structure::kSmall;
    plan.rows = kSmallRows;
    each_query_tile(plan, kSmallTiles, [&] {
      if (why_not_small(shape_, plan) != nullptr) return;
      const double cost = count_small(shape_, plan).cost;
      if (best_.takes(cost)) best_.add({plan, cost});
    });
    return best_.sorted();
  }

  std::vector<Candidate> tiled(int rows) {
    const TileLimits limits = forward_limits(shape_, rows);
    std::vector<Candidate> queries;  // scored as if key tiles were single keys
    Plan plan;
    plan.rows = rows;
    each_query_tile(plan, limits, [&] {
      TileCounts counts = counts_.count(plan, false);
      counts.masked = 0;  // of single keys too many are
      queries.push_back({plan, cost_of_tiles(counts, limits.warps, limits.queries)});
    });
    std::stable_sort(queries.begin(), queries.end(),
                     [](const Candidate& a, const Candidate& b) { return a.score < b.score; });
    queries.resize(std::min(queries.size(), kMostQueryTiles));

    std::vector<int> sizes[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) sizes[a] = all_sizes_along(shape_.neighborhood.axes[a], limits.keys);
    // Of each query tile no more key tiles than it takes to make up the number: they differ little.
    const size_t of_each = (count_ + queries.size() - 1) / queries.size();
    for (const Candidate& query : queries) {
      plan = query.plan;
      Best<Candidate> best(of_each);
      each_triple(sizes, smallest_of(sizes, limits.keys), limits.keys, [&](const Triple& keys) {
        copy(keys, plan.key_tile);
        const double pairs = double(limits.queries) * limits.keys;
        const double cost = cost_of_tiles(counts_.count(plan, product(keys) < limits.keys), limits.warps, pairs);
        if (best.takes(cost)) best.add({plan, cost});
      });
      for (const Candidate& candidate : best.sorted()) {
        if (best_.takes(candidate.score)) best_.add(candidate);
      }
    }
    return best_.sorted();
  }

 private:
  static constexpr size_t kMostQueryTiles = 24;

  // Calls `visit` with each query tile worth trying in `plan`.
  template <typename Visit>
  void each_query_tile(Plan& plan, const TileLimits& limits, Visit visit) {
    const int first = kMaxRank - shape_.neighborhood.rank;
    std::vector<int> sizes[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) sizes[a] = all_sizes_along(shape_.neighborhood.axes[a], limits.queries);
    each_triple(sizes, smallest_of(sizes, limits.queries), limits.queries, [&](const Triple& part) {
      for_each_factorisation(log2_of(limits.warps), first, [&](const int (&warps)[kMaxRank]) {
        for (int a = 0; a < kMaxRank; ++a) {
          plan.query_part[a] = part[a];
          plan.query_tile[a] = part[a] << warps[a];
        }
        visit();
      });
    });
  }

  const FusedShape& shape_;
  AxisCounts counts_;
  const size_t count_;
  Best<Candidate> best_;
};

}  // namespace

PlanWork count_work(const FusedShape& shape, const Plan& plan) {
  PlanWork work = plan.structure == Structure::kSmall ? count_small(shape, plan) : count_tiled(shape, plan);
  work.pairs = count_pairs(shape.neighborhood);
  const double repeats = double(shape.batch) * shape.heads;
  for (double* count : {&work.tiles.query_tiles, &work.tiles.parts, &work.tiles.visited, &work.tiles.computed,
                        &work.tiles.masked, &work.pairs, &work.computed_pairs, &work.cost}) {
    *count *= repeats;
  }
  return work;
}

std::vector<Plan> rank_forward_plans(const FusedShape& shape, int count) {
  if (count < 1 || why_not_fused(shape) != nullptr) return {};
  if (shape.batch * shape.neighborhood.positions() * shape.heads == 0) return {};
  const Plan chosen = plan_forward(shape);
  if (count == 1) return {chosen};
  std::vector<std::vector<Candidate>> kernels;
  if (why_not_any_small(shape) == nullptr) kernels.push_back(Search(shape, size_t(count)).small());
  for (const int rows : {32, 64, 128}) {
    if (forward_has_rows(shape, rows)) kernels.push_back(Search(shape, size_t(count)).tiled(rows));
  }
  std::vector<Plan> ranked = {chosen};
  for (size_t place = 0; ranked.size() < size_t(count) && place < size_t(count); ++place) {
    for (const std::vector<Candidate>& kernel : kernels) {
      if (place >= kernel.size() || ranked.size() == size_t(count)) continue;
      if (encode_plan(kernel[place].plan) != encode_plan(chosen)) ranked.push_back(kernel[place].plan);
    }
  }
  return ranked;
}

}  // namespace jax_natten::sm80
