#include "tile_model.h"

#include <algorithm>
#include <numeric>

namespace jax_natten {
namespace {

int divide_up(int x, int y) { return (x + y - 1) / y; }

// One dilation group of an axis, cut into query tiles.
struct Group {
  const Axis& axis;
  int length, query_tile;

  int first(int tile) const { return tile * query_tile; }
  int last(int tile) const { return std::min(first(tile) + query_tile, length) - 1; }
  int tiles() const { return divide_up(length, query_tile); }
  Interval window(int query) const { return window_of_query(axis, query, length); }

  // Where the window of a query would begin if the group had no ends.
  int64_t free_begin(int query) const {
    const int64_t block = query / axis.stride * axis.stride;
    return axis.causal ? block + axis.stride - axis.window : block + axis.stride / 2 - axis.window / 2;
  }
  // Whether the stride block of a query is cut off by the end of the group, so that its leader is the last position.
  bool cut_off(int query) const {
    const int64_t block = query / axis.stride * axis.stride;
    return block + (axis.causal ? axis.stride - 1 : axis.stride / 2) > length - 1;
  }
};

// Tiles begin .. begin + count - 1. What is counted in tile t + period exceeds what is counted in tile t by a constant.
struct Run {
  int begin, count, period;
};

// The smallest tile of 0 .. tiles that satisfies a predicate which then holds for all that follow.
template <typename Predicate>
int first_tile(int tiles, Predicate predicate) {
  int low = 0, high = tiles;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    predicate(middle) ? high = middle : low = middle + 1;
  }
  return low;
}

// Calls `visit` with runs that make up all tiles of a group. Windows are held by an end or not:
//   held by the first position: they begin at 0; causal ones end later and later
//   free: tiles repeat with the stride
//   held by the last position: they begin at length - window (causal ones too, once the stride block is cut off)
// Tiles that are partly the one and partly the other make runs of their own.
template <typename Visit>
void for_each_run(const Group& group, int key_tile, Visit visit) {
  const Axis& axis = group.axis;
  const int tiles = group.tiles(), whole_tiles = group.length / group.query_tile;
  const int growing = axis.causal ? key_tile / std::gcd(key_tile, group.query_tile) : 1;
  const int sliding = axis.stride / std::gcd(axis.stride, group.query_tile);
  const int last_begin = group.length - axis.window;
  const auto held_high = [&](int query) { return group.cut_off(query) || group.free_begin(query) >= last_begin; };
  const int low_end = first_tile(whole_tiles, [&](int t) { return group.free_begin(group.last(t)) > 0; });
  const int free_begin = first_tile(whole_tiles, [&](int t) { return group.free_begin(group.first(t)) >= 0; });
  const int free_end = first_tile(
      whole_tiles, [&](int t) { return group.cut_off(group.last(t)) || group.free_begin(group.last(t)) > last_begin; });
  const int high_begin = first_tile(
      whole_tiles, [&](int t) { return axis.causal ? group.cut_off(group.first(t)) : held_high(group.first(t)); });

  const int ends[] = {low_end, free_begin, free_end, high_begin, whole_tiles, tiles};
  const int periods[] = {growing, 0, sliding, 0, growing, 0};  // 0: every tile on its own
  int begin = 0;
  for (int n = 0; n < 6; ++n) {
    const int end = std::max(begin, ends[n]);
    if (end > begin) visit(Run{begin, end - begin, periods[n] == 0 ? end - begin : periods[n]});
    begin = end;
  }
}

AxisTileCounts count_tile(const Group& group, int query_part, int key_tile, int tile) {
  const int first = group.first(tile), last = group.last(tile);
  const int base = group.window(first).begin, key_end = group.window(last).end;
  AxisTileCounts counts;
  counts.query_tiles = 1;
  counts.visited = divide_up(key_end - base, key_tile);
  for (int part = first; part <= last; part += query_part) {
    const Interval low = group.window(part), high = group.window(std::min(part + query_part - 1, last));
    ++counts.parts;
    counts.computed += divide_up(high.end - base, key_tile) - (low.begin - base) / key_tile;
    counts.whole += std::max((low.end - base) / key_tile - divide_up(high.begin - base, key_tile), 0);
  }
  return counts;
}

void add(AxisTileCounts& sum, const AxisTileCounts& term, int64_t times) {
  sum.query_tiles += times * term.query_tiles;
  sum.parts += times * term.parts;
  sum.visited += times * term.visited;
  sum.computed += times * term.computed;
  sum.whole += times * term.whole;
}

AxisTileCounts count_run(const Group& group, int query_part, int key_tile, const Run& run) {
  const auto sum_of = [&](int begin, int count) {
    AxisTileCounts sum;
    for (int t = begin; t < begin + count; ++t) add(sum, count_tile(group, query_part, key_tile, t), 1);
    return sum;
  };
  if (run.count <= 2 * run.period) return sum_of(run.begin, run.count);
  // An arithmetic series of periods, and the tiles that are left over.
  const int64_t periods = run.count / run.period;
  const AxisTileCounts first = sum_of(run.begin, run.period), second = sum_of(run.begin + run.period, run.period);
  AxisTileCounts sum = sum_of(run.begin + int(periods) * run.period, run.count - int(periods) * run.period);
  const int64_t increments = periods * (periods - 1) / 2;
  add(sum, first, periods - increments);
  add(sum, second, increments);
  return sum;
}

// Calls `visit` with the length of each kind of dilation group and how many of them there are.
template <typename Visit>
void for_each_length(const Axis& axis, Visit visit) {
  const int shorter = axis.length / axis.dilation, longer_groups = axis.length % axis.dilation;
  if (longer_groups > 0) visit(shorter + 1, longer_groups);
  if (shorter > 0) visit(shorter, axis.dilation - longer_groups);
}

}  // namespace

AxisTileCounts count_axis_tiles(const Axis& axis, int query_tile, int query_part, int key_tile) {
  AxisTileCounts sum;
  for_each_length(axis, [&](int length, int groups) {
    const Group group{axis, length, query_tile};
    for_each_run(group, key_tile,
                 [&](const Run& run) { add(sum, count_run(group, query_part, key_tile, run), groups); });
  });
  return sum;
}

TileCounts count_tiles(const AxisTileCounts (&axes)[kMaxRank], bool padded) {
  TileCounts counts;
  double whole = 1;
  for (const AxisTileCounts& axis : axes) {
    counts.query_tiles *= double(axis.query_tiles);
    counts.parts *= double(axis.parts);
    counts.visited *= double(axis.visited);
    counts.computed *= double(axis.computed);
    whole *= double(axis.whole);
  }
  counts.masked = padded ? counts.computed : counts.computed - whole;
  return counts;
}

TileCounts count_tiles(const Neighborhood& neighborhood, const int (&query_tile)[kMaxRank],
                       const int (&query_part)[kMaxRank], const int (&key_tile)[kMaxRank], bool padded) {
  AxisTileCounts axes[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    axes[a] = count_axis_tiles(neighborhood.axes[a], query_tile[a], query_part[a], key_tile[a]);
  }
  return count_tiles(axes, padded);
}

double count_pairs(const Neighborhood& neighborhood) {
  double pairs = 1;
  for (const Axis& axis : neighborhood.axes) pairs *= double(count_axis_tiles(axis, 1, 1, 1).visited);
  return pairs;
}

int most_keys_of_queries(const Axis& axis, int queries) {
  int most = 0;
  for_each_length(axis, [&](int length, int) {
    const Group group{axis, length, queries};
    for_each_run(group, 1, [&](const Run& run) {
      const auto look_at = [&](int begin, int count) {
        for (int t = begin; t < begin + count; ++t) {
          most = std::max(most, group.window(group.last(t)).end - group.window(group.first(t)).begin);
        }
      };
      look_at(run.begin, std::min(run.period, run.count));
      if (run.count > run.period) look_at(run.begin + run.count - run.period, run.period);
    });
  });
  return most;
}

}  // namespace jax_natten
