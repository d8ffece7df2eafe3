// Compares the counts of tile_model.h with a walk over the tiles through tiling.h, as the fused kernels make it. Exits
// with 1 and a description on the first difference.
//
//   test_tile_model [random problems [seed]]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/common/tile_model.h"
#include "../../cuda/common/tiling.h"

namespace jax_natten {
namespace {

struct Case {
  Neighborhood neighborhood;
  Walk walk = Walk::kKeysOfQueries;
  int query_tile[kMaxRank] = {1, 1, 1}, query_part[kMaxRank] = {1, 1, 1}, key_tile[kMaxRank] = {1, 1, 1};
  bool padded = false;

  std::string describe() const {
    std::string text = "rank " + std::to_string(neighborhood.rank) + (padded ? " padded" : "");
    if (walk == Walk::kQueriesOfKeys) text += " queries of keys";
    for (int a = kMaxRank - neighborhood.rank; a < kMaxRank; ++a) {
      const Axis& axis = neighborhood.axes[a];
      text += " [x" + std::to_string(axis.length) + " k" + std::to_string(axis.window) + " s" +
              std::to_string(axis.stride) + " d" + std::to_string(axis.dilation) + (axis.causal ? " causal" : "") +
              " tile " + std::to_string(query_tile[a]) + "/" + std::to_string(query_part[a]) + "/" +
              std::to_string(key_tile[a]) + "]";
    }
    return text;
  }
};

template <int kRank, Walk kWalk>
TileCounts walk(const Case& c) {
  TileSchedule schedule;
  int64_t tiles = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    schedule.axes[a] = TiledAxis(c.neighborhood.axes[a], c.query_tile[a], c.query_part[a], c.key_tile[a]);
    tiles *= int64_t(schedule.axes[a].query_tiles) * schedule.axes[a].dilation;
  }
  schedule.by_heads = schedule.by_group = FastDivisor(1);
  const int parts = schedule.axes[0].parts() * schedule.axes[1].parts() * schedule.axes[2].parts();
  TileCounts counts{0, 0, 0, 0, 0};
  for (int index = 0; index < int(tiles); ++index) {
    const QueryTile tile = decode_query_tile<kRank, kWalk>(schedule, index);
    if (tile.empty()) continue;
    ++counts.query_tiles;
    for (int p = 0; p < parts; ++p) {
      int offset[kMaxRank];
      query_part_offset(schedule.axes, p, offset);
      const QueryPart<kRank, kWalk> part(schedule.axes, tile, offset);
      counts.parts += part.live;
      KeyTileCursor<kRank> cursor;
      do {
        const TileClass tile_class = part.classify(schedule.axes, cursor.begin, c.padded);
        counts.visited += p == 0;
        counts.computed += tile_class != TileClass::kSkip;
        counts.masked += tile_class == TileClass::kMasked;
      } while (cursor.next(schedule.axes, tile.extent));
    }
  }
  return counts;
}

template <int kRank>
TileCounts walk(const Case& c) {
  return c.walk == Walk::kKeysOfQueries ? walk<kRank, Walk::kKeysOfQueries>(c) : walk<kRank, Walk::kQueriesOfKeys>(c);
}

double walk_over_pairs(const Neighborhood& neighborhood) {
  double pairs = 1;
  for (const Axis& axis : neighborhood.axes) {
    double seen = 0;
    for (int x = 0; x < axis.length; ++x) {
      const Interval keys = window_of_query(axis, x / axis.dilation, group_length(axis, x % axis.dilation));
      seen += keys.end - keys.begin;
    }
    pairs *= seen;
  }
  return pairs;
}

// Looks at the pairs themselves, since runs of keys are seen by intervals of queries only because of what
// queries_of_key() says about them.
int walk_over_runs(const Axis& axis, int queries, Walk walk) {
  int most = 0;
  for (int group = 0; group < axis.dilation; ++group) {
    const int length = group_length(axis, group), runs = (length + queries - 1) / queries;
    std::vector<Interval> seen(runs, Interval{length, 0});
    for (int query = 0; query < length; ++query) {
      const Interval keys = window_of_query(axis, query, length);
      if (walk == Walk::kKeysOfQueries) {
        Interval& run = seen[query / queries];
        run = {imin(run.begin, keys.begin), imax(run.end, keys.end)};
      } else {
        for (int r = keys.begin / queries; r <= (keys.end - 1) / queries; ++r) {
          seen[r] = {imin(seen[r].begin, query), imax(seen[r].end, query + 1)};
        }
      }
    }
    for (const Interval& run : seen) most = imax(most, run.end - run.begin);
  }
  return most;
}

void check(const Case& c) {
  const int rank = c.neighborhood.rank;
  const TileCounts expected = rank == 1 ? walk<1>(c) : rank == 2 ? walk<2>(c) : walk<3>(c);
  const TileCounts got = count_tiles(c.neighborhood, c.query_tile, c.query_part, c.key_tile, c.padded, c.walk);
  const auto expect = [&](const char* what, double got, double expected) {
    if (got == expected) return;
    std::printf("%s: %s is %.0f, a walk over the tiles says %.0f\n", c.describe().c_str(), what, got, expected);
    std::exit(1);
  };
  expect("query tiles", got.query_tiles, expected.query_tiles);
  expect("parts", got.parts, expected.parts);
  expect("visited", got.visited, expected.visited);
  expect("computed", got.computed, expected.computed);
  expect("masked", got.masked, expected.masked);
  expect("pairs", count_pairs(c.neighborhood), walk_over_pairs(c.neighborhood));
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = c.neighborhood.axes[a];
    for (const int queries : {c.query_tile[a], c.query_part[a]}) {
      expect("most keys", most_keys_of_queries(axis, queries, c.walk), walk_over_runs(axis, queries, c.walk));
    }
  }
}

Case random_case(std::mt19937& random) {
  Case c;
  const int rank = c.neighborhood.rank = 1 + random() % 3;
  c.padded = random() % 4 == 0;
  // Long axes beside small tiles, so that every kind of run has several periods.
  const int sizes[] = {random() % 3 ? 300 : 6000, 60, 24}, tiles[] = {100, 12, 6};
  for (int a = kMaxRank - rank; a < kMaxRank; ++a) {
    Axis& axis = c.neighborhood.axes[a];
    axis.dilation = random() % 2 ? 1 : 1 + random() % 4;
    axis.length = axis.dilation + random() % sizes[rank - 1];
    const int most = axis.length / axis.dilation;
    axis.window = random() % 4 == 0 ? most : 1 + random() % (random() % 2 ? most : std::min(most, 9));
    axis.stride = random() % 2 ? 1 : 1 + random() % axis.window;
    axis.causal = random() % 3 == 0;
    c.query_part[a] = 1 + random() % tiles[rank - 1];
    c.query_tile[a] = c.query_part[a] * (1 + random() % 3);
    c.key_tile[a] = 1 + random() % tiles[rank - 1];
  }
  return c;
}

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 0);
  for (int i = 0; i < count; ++i) {
    Case c = random_case(random);
    for (const Walk walk : {Walk::kKeysOfQueries, Walk::kQueriesOfKeys}) {
      c.walk = walk;
      check(c);
    }
  }
  std::printf("%d problems counted\n", count);
  return 0;
}

}  // namespace
}  // namespace jax_natten

int main(int argc, char** argv) { return jax_natten::main(argc, argv); }
