#include "choose.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "cost.h"
#include "warp_shape.h"
#include "wide_shape.h"

namespace jax_natten::sm90 {
namespace {

using Triple = int[kMaxRank];

// Sizes of tiles worth trying along an axis, ascending: powers of two (`thirds`: and three times those) up to the first
// that holds the longest dilation group, and the length of that.
std::vector<int> sizes_along(const Axis& axis, int most, bool thirds) {
  std::vector<int> sizes;
  const int length = group_length(axis, 0);
  for (int size = 1; size <= most; size *= 2) {
    sizes.push_back(size);
    if (size >= length) break;
    if (thirds && 3 * size <= most && 3 * size < length) sizes.push_back(3 * size);
  }
  if (length <= most) sizes.push_back(length);
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

// All sizes up to `most`, and to the first that holds the longest dilation group.
std::vector<int> all_sizes_along(const Axis& axis, int most) {
  std::vector<int> sizes(std::min(most, group_length(axis, 0)));
  std::iota(sizes.begin(), sizes.end(), 1);
  return sizes;
}

// Calls `visit` with triples of sizes whose product is least .. most.
template <typename Visit>
void each_triple(const std::vector<int> (&sizes)[kMaxRank], int least, int most, Visit visit) {
  for (const int x0 : sizes[0]) {
    if (x0 > most) break;
    for (const int x1 : sizes[1]) {
      if (x0 * x1 > most) break;
      for (const int x2 : sizes[2]) {
        const int all = x0 * x1 * x2;
        if (all > most) break;
        const Triple triple = {x0, x1, x2};
        if (all >= least) visit(triple);
      }
    }
  }
}

struct QueryShape {
  int tile[kMaxRank], part[kMaxRank];
  double work;  // by which shapes are compared before key tiles are looked at
};

// Keeps the `count` shapes with the least work.
void keep_best(std::vector<QueryShape>& shapes, size_t count) {
  const auto less = [](const QueryShape& a, const QueryShape& b) { return a.work < b.work; };
  if (shapes.size() > count) {
    std::nth_element(shapes.begin(), shapes.begin() + count, shapes.end(), less);
    shapes.resize(count);
  }
}

bool better(const Candidate& a, const Candidate& b) { return a.score < b.score; }

// Enumerates plans. One member function per structure.
class Search {
 public:
  Search(const FusedShape& shape, int processors, size_t count)
      : shape_(shape),
        axes_(shape.neighborhood.axes),
        first_axis_(kMaxRank - shape.neighborhood.rank),
        model_(shape, processors),
        count_(count) {
    cache_.reserve(1024);
  }

  void wide() {
    const WideShape compiled = wide_shape(compiled_head_dim(shape_.dim));
    std::vector<int> part_sizes[kMaxRank], key_sizes[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      part_sizes[a] = sizes_along(axes_[a], kWideGroupRows, /*thirds=*/false);
      key_sizes[a] = sizes_along(axes_[a], compiled.keys, /*thirds=*/true);
    }
    std::vector<QueryShape> queries;
    each_triple(part_sizes, smallest_of(part_sizes, kWideGroupRows), kWideGroupRows, [&](const Triple& part) {
      for (int split = first_axis_; split < kMaxRank; ++split) {
        QueryShape query;
        query.work = 1;
        for (int a = 0; a < kMaxRank; ++a) {
          query.part[a] = part[a];
          query.tile[a] = part[a] * (a == split ? kWideGroups : 1);
          query.work *= double(counts(a, query.tile[a], query.tile[a], 1).visited);  // keys of all tiles
        }
        queries.push_back(query);
      }
    });
    keep_best(queries, kMostWideShapes);

    Plan plan;
    plan.structure = Structure::kWide;
    for (const QueryShape& query : queries) {
      copy(query.tile, plan.query_tile);
      copy(query.part, plan.query_part);
      each_triple(key_sizes, smallest_of(key_sizes, compiled.keys), compiled.keys, [&](const Triple& keys) {
        copy(keys, plan.key_tile);
        propose(plan, model_.wide(plan, count(plan, product(keys) < compiled.keys)).seconds);
      });
    }
  }

  // Boxes hold all that a query tile sees along the inner axes. Along the outermost one they may be slices, so that the
  // part of a box that a warp gathers fits a compiled list.
  void warp() {
    if (best_.size() == count_ && model_.least_warp() >= worst_) return;
    const int dim = warp_compiled_dim(shape_.dim);
    const int most_warps = warp_most_threads(dim) / 32 - 1;
    std::vector<int> part_sizes[kMaxRank], multiples[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) part_sizes[a] = all_sizes_along(axes_[a], kWarpRows);
    std::vector<QueryShape> queries;
    each_triple(part_sizes, smallest_of(part_sizes, kWarpRows), kWarpRows, [&](const Triple& part) {
      QueryShape query;
      query.work = 1;
      int most = 1;
      for (int a = 0; a < kMaxRank; ++a) {
        query.part[a] = part[a];
        query.work *= double(counts(a, part[a], part[a], 1).visited);
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
        multiples[a].resize(std::min(longest, most_warps));
        std::iota(multiples[a].begin(), multiples[a].end(), 1);
      }
      each_triple(multiples, std::min(smallest_of(multiples, most_warps), 3), most_warps, [&](const Triple& times) {
        for (int a = 0; a < kMaxRank; ++a) plan.query_tile[a] = query.part[a] * times[a];
        for (plan.heads = 1; plan.heads <= (shape_.dim == 32 ? 2 : 1); ++plan.heads) {
          if (product(times) * plan.heads <= most_warps) slices(plan);
        }
      });
    }
  }

  std::vector<Candidate> result() {
    std::sort(best_.begin(), best_.end(), better);
    return std::move(best_);
  }

 private:
  static constexpr int kMostKeysOfBox = 256;  // along an axis, as the TMA has it
  static constexpr size_t kMostWideShapes = 24, kMostWarpShapes = 6;

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
      if (list == 0) return;
      const bool sliced = slice < most_keys(first_axis_, plan.query_tile[first_axis_]);
      plan.slots = plan.stages = 2;
      if (make_warp_layout(shape_, plan).bytes > kSharedBytes) return;
      const int blocks = warp_blocks_of_processor(shape_, plan);
      // Boxes of one query tile follow each other fast: as many stages as cost no CTA.
      for (int stages = kWarpMostStages; sliced && stages > 2; --stages) {
        plan.stages = stages;
        if (make_warp_layout(shape_, plan).bytes <= kSharedBytes && warp_blocks_of_processor(shape_, plan) == blocks) {
          break;
        }
        plan.stages = 2;
      }
      propose(plan, model_.warp(plan, count(plan, false), list, blocks).seconds);
    };
    attempt(whole);
    for (const int list : kWarpLists) {
      const int slice = std::min(list / inner, whole);
      attempt(slice);
      if (slice > 0) attempt((whole + (whole + slice - 1) / slice - 1) / ((whole + slice - 1) / slice));
    }
    for (const int slice : {1, 2, 4}) attempt(std::min(slice, whole));
  }

  // The product that all triples worth looking at reach: three quarters of `most`, or less on a small grid.
  static int smallest_of(const std::vector<int> (&sizes)[kMaxRank], int most) {
    int64_t largest = 1;
    for (const std::vector<int>& along : sizes) largest *= along.back();
    return int(std::min<int64_t>(largest, most * 3 / 4));
  }

  static void copy(const Triple& from, Triple& to) { std::copy(from, from + kMaxRank, to); }

  int most_keys(int a, int queries) {
    int& known = most_keys_[a][queries];
    if (known == 0) known = most_keys_of_queries(axes_[a], queries);
    return known;
  }

  TileCounts count(const Plan& plan, bool padded) {
    const AxisTileCounts along[kMaxRank] = {counts(0, plan.query_tile[0], plan.query_part[0], plan.key_tile[0]),
                                            counts(1, plan.query_tile[1], plan.query_part[1], plan.key_tile[1]),
                                            counts(2, plan.query_tile[2], plan.query_part[2], plan.key_tile[2])};
    return count_tiles(along, padded);
  }

  const AxisTileCounts& counts(int a, int query_tile, int query_part, int key_tile) {
    const uint64_t id = ((uint64_t(a) << 16 | query_tile) << 16 | query_part) << 16 | key_tile;
    const auto found = cache_.find(id);
    if (found != cache_.end()) return found->second;
    return cache_.emplace(id, count_axis_tiles(axes_[a], query_tile, query_part, key_tile)).first->second;
  }

  // Plans of equal work differ little. Those that were measured to be best have one head to a box, key tiles shaped as
  // their query tiles, and boxes that are compact and short along the innermost axis.
  double preference(const Plan& plan) const {
    const auto elongation = [&](const Triple& tile) {
      return std::log2(double(*std::max_element(tile + first_axis_, tile + kMaxRank)) /
                       *std::min_element(tile + first_axis_, tile + kMaxRank));
    };
    const bool alike = std::equal(plan.key_tile, plan.key_tile + kMaxRank, plan.query_tile);
    return 1 + 1e-2 * (plan.heads - 1) + 3e-3 * !alike + 1e-3 * elongation(plan.key_tile) +
           5e-4 * elongation(plan.query_part) + 5e-4 * std::log2(plan.key_tile[kMaxRank - 1]);
  }

  void propose(const Plan& plan, double seconds) {
    if (best_.size() == count_ && seconds >= worst_) return;
    const double score = seconds * preference(plan);
    if (best_.size() == count_ && score >= worst_) return;
    if (why_not(shape_, plan) != nullptr) return;
    if (best_.size() == count_) best_.erase(std::max_element(best_.begin(), best_.end(), better));
    best_.push_back({plan, seconds, score});
    worst_ = std::max_element(best_.begin(), best_.end(), better)->score;
  }

  const FusedShape& shape_;
  const Axis* axes_;
  const int first_axis_;
  const CostModel model_;
  const size_t count_;
  std::vector<Candidate> best_;
  double worst_ = 0;
  std::unordered_map<uint64_t, AxisTileCounts> cache_;
  int most_keys_[kMaxRank][257] = {};
};

// Everything that a choice depends on.
using Key = std::vector<int64_t>;

Key key_of(const FusedShape& shape, int processors) {
  Key key = {processors,     int(shape.dtype), shape.neighborhood.rank, shape.batch,      shape.heads,
             shape.kv_heads, shape.dim,        shape.value_dim,         shape.additional, shape.bias_batch};
  for (const Axis& axis : shape.neighborhood.axes) {
    key.insert(key.end(), {axis.length, axis.window, axis.stride, axis.dilation, axis.causal});
  }
  return key;
}

}  // namespace

std::vector<Candidate> rank_plans(const FusedShape& shape, int processors, int count) {
  if (count < 1 || why_not_any(shape) != nullptr || is_empty(shape)) return {};
  Search search(shape, processors, size_t(count));
  search.wide();
  if (shape.dim <= 64) search.warp();
  return search.result();
}

bool choose_plan(const FusedShape& shape, int processors, Plan& plan) {
  static std::mutex mutex;
  static std::map<Key, std::vector<Candidate>> known;
  const Key key = key_of(shape, processors);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) {
      if (!found->second.empty()) plan = found->second[0].plan;
      return !found->second.empty();
    }
  }
  std::vector<Candidate> best = rank_plans(shape, processors, 1);
  const bool any = !best.empty();
  if (any) plan = best[0].plan;
  constexpr size_t kMostKnown = 4096;  // shapes of a program that never stops making up new ones
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= kMostKnown) known.clear();
  known.emplace(key, std::move(best));
  return any;
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
  int list[kMaxRank];
  find_warp_list(shape, plan, list);
  return model.warp(plan, count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, plan.key_tile, false),
                    warp_compiled_list(product(list)), warp_blocks_of_processor(shape, plan));
}

}  // namespace jax_natten::sm90
