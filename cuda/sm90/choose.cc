#include "choose.h"

#include <algorithm>
#include <numeric>

#include "cost.h"
#include "middle_shape.h"
#include "search.h"
#include "warp_shape.h"
#include "wide_shape.h"

namespace jax_natten::sm90 {
namespace {

// Enumerates plans. One member function per structure.
class Search {
 public:
  Search(const FusedShape& shape, int processors, size_t count)
      : shape_(shape),
        axes_(shape.neighborhood.axes),
        first_axis_(kMaxRank - shape.neighborhood.rank),
        model_(shape, processors),
        counts_(axes_, Walk::kKeysOfQueries),
        best_(count) {}

  void wide() {
    const WarpgroupShape compiled = wide_shape(compiled_head_dim(shape_.dim));
    std::vector<int> key_sizes[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) key_sizes[a] = sizes_along(axes_[a], compiled.keys, /*odd=*/3);

    Plan plan;
    plan.structure = Structure::kWide;
    for (const QueryShape& query :
         query_shapes(shape_.neighborhood, counts_, kWideGroups, kWarpgroupRows, kMostWideShapes)) {
      copy(query.tile, plan.query_tile);
      copy(query.part, plan.query_part);
      each_triple(key_sizes, smallest_of(key_sizes, compiled.keys), compiled.keys, [&](const Triple& keys) {
        copy(keys, plan.key_tile);
        propose(plan, model_.wide(plan, counts_.count(plan, product(keys) < compiled.keys)).seconds);
      });
    }
  }

  // Key tiles are slices of what a query tile sees: along the outermost axis, or of long windows along all.
  void middle() {
    const int dim = compiled_head_dim(shape_.dim), most_columns = middle_shape(dim, kMiddleVariants - 1).keys;
    Plan plan;
    plan.structure = Structure::kMiddle;
    for (const QueryShape& query : query_shapes(shape_.neighborhood, counts_, 1, kWarpgroupRows, kMostMiddleShapes)) {
      copy(query.tile, plan.query_tile);
      copy(query.part, plan.query_part);
      std::vector<int> key_sizes[kMaxRank];
      for (int a = 0; a < kMaxRank; ++a) {
        key_sizes[a] = slices_of(most_keys(a, query.tile[a]), most_columns);
      }
      for (int variant = 0; variant < kMiddleVariants; ++variant) {
        const int columns = middle_shape(dim, variant).keys;
        each_triple(key_sizes, smallest_of(key_sizes, columns), columns, [&](const Triple& keys) {
          copy(keys, plan.key_tile);
          if (middle_variant(dim, product(keys)) != variant) return;
          propose(plan, model_.middle(plan, counts_.count(plan, false)).seconds);
        });
      }
    }
  }

  // Boxes hold all that a query tile sees along the inner axes. Along the outermost one they may be slices, so that the
  // part of a box that a warp gathers fits a compiled list.
  void warp() {
    if (!best_.takes(model_.least_warp())) return;
    const int dim = warp_compiled_dim(shape_.dim);
    const int most_warps = warp_most_threads(dim, kWarpLists[0]) / 32 - 1;
    std::vector<int> part_sizes[kMaxRank], multiples[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) part_sizes[a] = all_sizes_along(axes_[a], kWarpRows);
    std::vector<QueryShape> queries;
    each_triple(part_sizes, smallest_of(part_sizes, kWarpRows), kWarpRows, [&](const Triple& part) {
      QueryShape query;
      query.work = 1;
      int most = 1;
      for (int a = 0; a < kMaxRank; ++a) {
        query.part[a] = part[a];
        query.work *= double(counts_(a, part[a], part[a], 1).visited);
        most *= std::min(most_keys(a, part[a]), 256);
      }
      if (const int list = warp_compiled_list(most)) query.work *= double(list) / most;
      queries.push_back(query);
    });
    keep_best(queries, kMostWarpShapes);

    Plan plan;
    plan.structure = Structure::kWarp;
    for (QueryShape& query : queries) {
      copy(query.part, plan.query_part);
      for (int a = 0; a < kMaxRank; ++a) {
        const int longest = (group_length(axes_[a], 0) + query.part[a] - 1) / query.part[a];
        multiples[a].resize(std::min({longest, most_warps, kMostPositions / query.part[a]}));
        std::iota(multiples[a].begin(), multiples[a].end(), 1);
      }
      each_triple(multiples, std::min(smallest_of(multiples, most_warps), 3), most_warps, [&](const Triple& times) {
        for (int a = 0; a < kMaxRank; ++a) plan.query_tile[a] = query.part[a] * times[a];
        for (plan.heads = 1; plan.heads <= (shape_.dim == 32 && !is_extended(shape_) ? 2 : 1); ++plan.heads) {
          if (product(times) * plan.heads <= most_warps) slices(plan);
        }
      });
    }
  }

  std::vector<Candidate> result() { return best_.sorted(); }

 private:
  static constexpr int kMostKeysOfBox = kMostPositions;  // as the TMA has it
  static constexpr size_t kMostWideShapes = 24, kMostMiddleShapes = 8, kMostWarpShapes = 6;

  // Sizes of equal slices that cover `whole` keys with as little excess as their number allows, ascending.
  static std::vector<int> slices_of(int whole, int most) {
    std::vector<int> sizes;
    for (int slices = (whole + most - 1) / most; slices <= whole; ++slices) {
      const int size = (whole + slices - 1) / slices;
      if (sizes.empty() || size < sizes.back()) sizes.push_back(size);
      if (sizes.size() == 12) break;
    }
    std::reverse(sizes.begin(), sizes.end());
    return sizes;
  }

  // Proposes the warp plans that differ in how boxes are sliced.
  void slices(Plan& plan) {
    int inner = 1;  // keys of the list, but for the outermost axis
    for (int a = kMaxRank - 1; a >= first_axis_; --a) {
      const int seen = most_keys(a, plan.query_tile[a]);
      if (seen > kMostKeysOfBox && a > first_axis_) return;
      plan.key_tile[a] = std::min(seen, kMostKeysOfBox);
      if (a > first_axis_) inner *= std::min(seen, most_keys(a, plan.query_part[a]));
    }
    const int whole = plan.key_tile[first_axis_], seen = most_keys(first_axis_, plan.query_part[first_axis_]);
    int tried[16], count_tried = 0;
    const auto attempt = [&](int slice) {
      if (slice < 1 || std::find(tried, tried + count_tried, slice) != tried + count_tried) return;
      tried[count_tried++] = slice;
      plan.key_tile[first_axis_] = slice;
      const int list = warp_compiled_list(inner * std::min(slice, seen));
      if (list == 0 || (plan.heads > 1 && list != kWarpPairList)) return;
      const bool sliced = slice < most_keys(first_axis_, plan.query_tile[first_axis_]);
      plan.slots = plan.stages = 2;
      if (make_warp_layout(shape_, plan).bytes > kSharedBytes) return;
      const int blocks = warp_blocks_of_processor(shape_, plan, list);
      // Boxes of one query tile follow each other fast: as many stages as cost no CTA.
      for (int stages = kWarpMostStages; sliced && stages > 2; --stages) {
        plan.stages = stages;
        if (make_warp_layout(shape_, plan).bytes <= kSharedBytes &&
            warp_blocks_of_processor(shape_, plan, list) == blocks) {
          break;
        }
        plan.stages = 2;
      }
      propose(plan, model_.warp(plan, counts_.count(plan, false), list, blocks).seconds);
    };
    attempt(whole);
    if (first_axis_ != warp_outer_axis(shape_)) return;
    for (const int list : kWarpLists) {
      const int slice = std::min(list / inner, whole);
      attempt(slice);
      if (slice > 0) attempt((whole + (whole + slice - 1) / slice - 1) / ((whole + slice - 1) / slice));
    }
    for (const int slice : {1, 2, 4}) attempt(std::min(slice, whole));
  }

  int most_keys(int a, int queries) {
    int& known = most_keys_[a][queries];
    if (known == 0) known = most_keys_of_queries(axes_[a], queries);
    return known;
  }

  void propose(const Plan& plan, double seconds) {
    if (!best_.takes(seconds)) return;
    const double score = seconds * (preference(plan, shape_.neighborhood.rank) + dislike(plan));
    if (!best_.takes(score) || why_not(shape_, plan) != nullptr) return;
    best_.add({plan, seconds, score});
  }

  // What the model does not count: boxes of two heads, and slices that are not contiguous.
  double dislike(const Plan& plan) {
    double dislike = 5e-2 * (plan.heads - 1);
    for (int a = first_axis_ + 1; plan.structure == Structure::kMiddle && a < kMaxRank; ++a) {
      if (plan.key_tile[a] < most_keys(a, plan.query_tile[a])) dislike += 3e-2;
    }
    return dislike;
  }

  const FusedShape& shape_;
  const Axis* axes_;
  const int first_axis_;
  const CostModel model_;
  AxisCounts counts_;
  Best<Candidate> best_;
  int most_keys_[kMaxRank][kMostPositions + 1] = {};
};

}  // namespace

std::vector<Candidate> rank_plans(const FusedShape& shape, int processors, int count) {
  if (count < 1 || why_not_any(shape) != nullptr || is_empty(shape)) return {};
  Search search(shape, processors, size_t(count));
  search.wide();
  if (shape.dim <= kMiddleMostDim && !is_extended(shape)) search.middle();
  if (shape.dim <= 64) search.warp();
  return search.result();
}

bool choose_plan(const FusedShape& shape, int processors, Plan& plan) {
  static Remembered<std::vector<Candidate>> known;
  const std::vector<Candidate> best =
      known.find(key_of(shape, processors), [&] { return rank_plans(shape, processors, 1); });
  if (!best.empty()) plan = best[0].plan;
  return !best.empty();
}

const char* why_not(const FusedShape& shape) {
  if (const char* reason = why_not_any(shape)) return reason;
  Plan plan;
  if (is_empty(shape) || choose_plan(shape, kProcessors, plan)) return nullptr;
  return "takes up to 2^31 - 1 tiles";
}

Prediction predict(const FusedShape& shape, const Plan& plan, int processors) {
  const CostModel model(shape, processors);
  if (plan.structure == Structure::kWide) {
    const bool padded = product(plan.key_tile) < wide_shape(compiled_head_dim(shape.dim)).keys;
    return model.wide(plan, count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, plan.key_tile, padded));
  }
  if (plan.structure == Structure::kMiddle) {
    return model.middle(plan, count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, plan.key_tile, false));
  }
  int list[kMaxRank];
  find_warp_list(shape, plan, list);
  return model.warp(plan, count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, plan.key_tile, false),
                    warp_compiled_list(product(list)), warp_blocks_of_processor(shape, plan));
}

}  // namespace jax_natten::sm90
