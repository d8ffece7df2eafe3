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
  Walk walk;

  int first(int tile) const { return tile * query_tile; }
  int last(int tile) const { return std::min(first(tile) + query_tile, length) - 1; }
  int tiles() const { return divide_up(length, query_tile); }
  // The keys that a query sees, or the queries that see a key.
  Interval window(int query) const {
    return walk == Walk::kKeysOfQueries ? window_of_query(axis, query, length) : queries_of_key(axis, query, length);
  }

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

// Ends of consecutive runs and their periods; 0: every tile on its own.
struct RunEnd {
  int end, period;
};

template <size_t count, typename Visit>
void visit_runs(const RunEnd (&ends)[count], Visit visit) {
  int begin = 0;
  for (const RunEnd& run : ends) {
    const int end = std::max(begin, run.end);
    if (end > begin) visit(Run{begin, end - begin, run.period == 0 ? end - begin : run.period});
    begin = end;
  }
}

// Calls `visit` with runs that make up all tiles of a group of queries. Windows are held by an end or not:
//   held by the first position: they begin at 0; causal ones end later and later
//   free: tiles repeat with the stride
//   held by the last position: they begin at length - window (causal ones too, once the stride block is cut off)
// Tiles that are partly the one and partly the other make runs of their own.
template <typename Visit>
void for_each_run_of_queries(const Group& group, int key_tile, Visit visit) {
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

  const RunEnd ends[] = {{low_end, growing}, {free_begin, 0},        {free_end, sliding},
                         {high_begin, 0},    {whole_tiles, growing}, {tiles, 0}};
  visit_runs(ends, visit);
}

// The same for a group of keys. The queries that see a key
//   begin with the first position for keys before `window` (of causal axes: for none), and end later and later
//   end with the last position for the last `window` keys, and begin later and later
//   move with the stride for keys that are neither
//   are all of them for keys that are both
// Among tiles of the second kind, the intersection of a part's intervals may come to hold no whole query tile. Those
// close to that, by the end of the group, are counted on their own.
template <typename Visit>
void for_each_run_of_keys(const Group& group, int query_tile, Visit visit) {
  const Axis& axis = group.axis;
  const int tiles = group.tiles(), whole_tiles = group.length / group.query_tile;
  const int low = axis.causal ? 0 : axis.window, high = group.length - axis.window;
  const int lesser = std::min(low, high), greater = std::max(low, high);
  const int64_t begins_step = axis.causal ? 1 : axis.stride, ends_step = axis.stride;
  const auto period = [&](int64_t unit) { return int(unit / std::gcd(unit, int64_t(group.query_tile))); };
  const int growing = period(std::lcm(ends_step, int64_t(query_tile)));
  const int between = low < high ? period(axis.stride) : 1;
  const int shrinking = period(std::lcm(begins_step, int64_t(query_tile)));
  const auto first_beginning_at = [&](int key) { return std::min(divide_up(key, group.query_tile), whole_tiles); };
  const auto first_ending_past = [&](int key) { return key / group.query_tile; };
  const int short_of_queries =
      first_tile(whole_tiles, [&](int t) { return group.length - group.window(group.last(t)).begin < 2 * query_tile; });

  const int linear_end = std::max(first_beginning_at(greater), short_of_queries);
  const RunEnd ends[] = {
      {first_ending_past(lesser), growing}, {first_beginning_at(lesser), 0}, {first_ending_past(greater), between},
      {first_beginning_at(greater), 0},     {linear_end, shrinking},         {tiles, 0}};
  visit_runs(ends, visit);
}

template <typename Visit>
void for_each_run(const Group& group, int key_tile, Visit visit) {
  if (group.walk == Walk::kKeysOfQueries) {
    for_each_run_of_queries(group, key_tile, visit);
  } else {
    for_each_run_of_keys(group, key_tile, visit);
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

AxisTileCounts count_axis_tiles(const Axis& axis, int query_tile, int query_part, int key_tile, Walk walk) {
  AxisTileCounts sum;
  for_each_length(axis, [&](int length, int groups) {
    const Group group{axis, length, query_tile, walk};
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
                       const int (&query_part)[kMaxRank], const int (&key_tile)[kMaxRank], bool padded, Walk walk) {
  AxisTileCounts axes[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    axes[a] = count_axis_tiles(neighborhood.axes[a], query_tile[a], query_part[a], key_tile[a], walk);
  }
  return count_tiles(axes, padded);
}

double count_pairs(const Neighborhood& neighborhood) {
  double pairs = 1;
  for (const Axis& axis : neighborhood.axes) pairs *= double(count_axis_tiles(axis, 1, 1, 1).visited);
  return pairs;
}

int most_keys_of_queries(const Axis& axis, int queries, Walk walk) {
  int most = 0;
  for_each_length(axis, [&](int length, int) {
    const Group group{axis, length, queries, walk};
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
