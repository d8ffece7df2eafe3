// Walks tiles exactly as the fused kernels do, through the headers that they use, and asserts that every query-key pair
// of a neighborhood is computed once and no other pair at all. Exits with 1 and a description on the first violation.
//
//   test_tiling [random problems [seed]]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/common/fast_division.h"
#include "../../cuda/common/key_mask.h"
#include "../../cuda/common/neighborhood.h"
#include "../../cuda/common/tiling.h"

namespace jax_natten {
namespace {

struct Case {
  int rank;
  Axis axes[kMaxRank];
  int query_tile[kMaxRank], query_part[kMaxRank], key_tile[kMaxRank];
  int columns;  // of the kernel's key tile
  int heads, group, batch;

  std::string describe() const {
    std::string text = "rank " + std::to_string(rank);
    for (int a = kMaxRank - rank; a < kMaxRank; ++a) {
      text += " [x" + std::to_string(axes[a].length) + " k" + std::to_string(axes[a].window) + " s" +
              std::to_string(axes[a].stride) + " d" + std::to_string(axes[a].dilation) +
              (axes[a].causal ? " causal" : "") + " tile " + std::to_string(query_tile[a]) + "/" +
              std::to_string(query_part[a]) + "/" + std::to_string(key_tile[a]) + "]";
    }
    return text;
  }
};

[[noreturn]] void fail(const Case& c, const std::string& what) {
  std::printf("%s: %s\n", c.describe().c_str(), what.c_str());
  std::exit(1);
}

int64_t position_of(const Case& c, const int* x) {
  return (int64_t(x[0]) * c.axes[1].length + x[1]) * c.axes[2].length + x[2];
}

// Marks the pairs that one part computes in one key tile. Masks are asked for exactly where the kernels ask.
template <int kRank, Walk kWalk>
void compute(const Case& c, const TileSchedule& schedule, const KeyMaskLayout& layout,
             const std::vector<uint32_t>& table, const QueryTile& tile, const QueryPart<kRank, kWalk>& part,
             const int* begin, TileClass tile_class, std::vector<uint8_t>& visits, int64_t positions) {
  const TiledAxis* axes = schedule.axes;
  const int rows = c.query_part[0] * c.query_part[1] * c.query_part[2];
  const int keys = c.key_tile[0] * c.key_tile[1] * c.key_tile[2];
  for (int row = 0; row < rows; ++row) {
    const int in_part[kMaxRank] = {row / (c.query_part[2] * c.query_part[1]), row / c.query_part[2] % c.query_part[1],
                                   row % c.query_part[2]};
    int query[kMaxRank] = {0, 0, 0};
    bool inside = true;
    Interval windows[kMaxRank];
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
      query[a] = part.query[a] + in_part[a];
      inside = inside && query[a] < tile.length[a];
      const Interval w = partners<kWalk>(axes[a], imin(query[a], tile.length[a] - 1), tile.length[a]);
      windows[a] = {w.begin - tile.key[a], w.end - tile.key[a]};
    }
    if (!inside) continue;  // computed, never stored
    int x[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) x[a] = query[a] * c.axes[a].dilation + tile.phase[a];
    const int64_t query_position = position_of(c, x);
    for (int n = 0; n < c.columns; ++n) {
      if (tile_class == TileClass::kMasked) {
        const uint32_t word = key_mask_word<kRank>(layout, table.data(), windows, begin, n % 8 / 2);
        if (!(word >> (n / 8 * 2 + n % 2) & 1)) continue;
      }
      if (n >= keys) fail(c, "a padding column is visible");
      const int in_tile[kMaxRank] = {n / (c.key_tile[2] * c.key_tile[1]), n / c.key_tile[2] % c.key_tile[1],
                                     n % c.key_tile[2]};
      int y[kMaxRank] = {0, 0, 0};
      for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
        const int key = tile.key[a] + begin[a] + in_tile[a];
        if (key < 0 || key >= tile.length[a]) fail(c, "a key outside the grid is visible");
        y[a] = key * c.axes[a].dilation + tile.phase[a];
      }
      if (++visits[query_position * positions + position_of(c, y)] > 1) fail(c, "a pair is computed twice");
    }
  }
}

// With Walk::kQueriesOfKeys, what is called query here is a key of the problem, and the other way round.
template <int kRank, Walk kWalk>
void walk(const Case& c) {
  TileSchedule schedule;
  int64_t tiles = int64_t(c.heads) * c.batch;
  for (int a = 0; a < kMaxRank; ++a) {
    schedule.axes[a] = TiledAxis(c.axes[a], c.query_tile[a], c.query_part[a], c.key_tile[a]);
    tiles *= int64_t(schedule.axes[a].query_tiles) * c.axes[a].dilation;
  }
  schedule.tiles = int(tiles);
  schedule.by_heads = FastDivisor(c.heads);
  schedule.by_group = FastDivisor(c.group);
  const KeyMaskLayout layout(c.key_tile[0], c.key_tile[1], c.key_tile[2]);
  if (layout.words > kMaxKeyMaskWords) fail(c, "the mask table is too large");
  std::vector<uint32_t> table(layout.words);
  fill_key_mask(layout, table.data());

  const int64_t positions = int64_t(c.axes[0].length) * c.axes[1].length * c.axes[2].length;
  std::vector<std::vector<uint8_t>> visits(c.heads * c.batch, std::vector<uint8_t>(positions * positions));
  const int parts = schedule.axes[0].parts() * schedule.axes[1].parts() * schedule.axes[2].parts();
  for (int index = 0; index < schedule.tiles; ++index) {
    const QueryTile tile = decode_query_tile<kRank, kWalk>(schedule, index);
    if (tile.empty()) continue;
    if (tile.head >= c.heads || tile.batch >= c.batch) fail(c, "a head or batch element does not exist");
    for (int p = 0; p < parts; ++p) {
      int offset[kMaxRank];
      query_part_offset(schedule.axes, p, offset);
      const QueryPart<kRank, kWalk> part(schedule.axes, tile, offset);
      KeyTileCursor<kRank> cursor;
      const bool padded = c.key_tile[0] * c.key_tile[1] * c.key_tile[2] < c.columns;
      do {
        const TileClass tile_class = part.classify(schedule.axes, cursor.begin, padded);
        if (tile_class == TileClass::kSkip) continue;
        compute<kRank, kWalk>(c, schedule, layout, table, tile, part, cursor.begin, tile_class,
                              visits[tile.batch * c.heads + tile.head], positions);
      } while (cursor.next(schedule.axes, tile.extent));
    }
  }

  for (const std::vector<uint8_t>& seen : visits) {
    for (int64_t q = 0; q < positions; ++q) {
      for (int64_t k = 0; k < positions; ++k) {
        bool neighbor = true;
        int64_t rest_q = q, rest_k = k;
        for (int a = kMaxRank - 1; a >= 0; --a) {
          const Axis& axis = c.axes[a];
          const int x = int(rest_q % axis.length), y = int(rest_k % axis.length);
          rest_q /= axis.length;
          rest_k /= axis.length;
          const int group = x % axis.dilation;
          const Interval w = window_of_query(axis, x / axis.dilation, group_length(axis, group));
          neighbor =
              neighbor && y % axis.dilation == group && y / axis.dilation >= w.begin && y / axis.dilation < w.end;
        }
        if (seen[kWalk == Walk::kKeysOfQueries ? q * positions + k : k * positions + q] != neighbor) {
          fail(c, (kWalk == Walk::kQueriesOfKeys ? "walk over keys: query " : "query ") + std::to_string(q) +
                      " and key " + std::to_string(k) +
                      (neighbor ? " are never computed" : " are computed but no neighbors"));
        }
      }
    }
  }
}

template <Walk kWalk>
void walk(const Case& c) {
  if (c.rank == 1) walk<1, kWalk>(c);
  if (c.rank == 2) walk<2, kWalk>(c);
  if (c.rank == 3) walk<3, kWalk>(c);
}

Case random_case(std::mt19937& random) {
  Case c = {};
  c.rank = 1 + random() % 3;
  c.heads = 1 + random() % 2;
  c.group = c.heads;
  c.batch = 1 + random() % 2;
  const int columns[] = {16, 64, 96, 128};
  c.columns = columns[random() % 4];
  const int sizes[] = {150, 18, 9}, queries[] = {64, 9, 5};
  int key_budget = c.columns, query_budget = 64;
  for (int a = 0; a < kMaxRank; ++a) {
    c.axes[a] = Axis();
    c.query_tile[a] = c.query_part[a] = c.key_tile[a] = 1;
    if (a < kMaxRank - c.rank) continue;
    Axis& axis = c.axes[a];
    axis.dilation = random() % 2 ? 1 : 1 + random() % 4;
    axis.length = axis.dilation + random() % sizes[c.rank - 1];
    const int most = axis.length / axis.dilation;
    axis.window = random() % 4 == 0 ? most : 1 + random() % most;
    axis.stride = random() % 2 ? 1 : 1 + random() % axis.window;
    axis.causal = random() % 3 == 0;
    c.query_part[a] = 1 + random() % imin(query_budget, queries[c.rank - 1]);
    query_budget /= c.query_part[a];
    c.query_tile[a] = c.query_part[a] * (1 + random() % 2);
    c.key_tile[a] = a == kMaxRank - 1 ? (random() % 2 ? key_budget : 1 + random() % key_budget)
                                      : 1 + random() % imin(key_budget, 12);
    key_budget /= c.key_tile[a];
  }
  return c;
}

void check_division(std::mt19937& random) {
  for (int i = 0; i < 20000; ++i) {
    const int d = i < 300 ? i + 1 : 1 + random() % (1u << (1 + random() % 31)) % 0x7fffffff;
    const FastDivisor divisor(d);
    const int dividends[] = {
        0, 1, d - 1, d, int(random() & 0x7fffffff), 0x7fffffff, 0x7fffffff / d * d, imax(0x7fffffff / d * d - 1, 0)};
    for (const int x : dividends) {
      int remainder;
      if (divisor.quotient(x) != x / d || divisor.divide(x, remainder) != x / d || remainder != x % d) {
        std::printf("%d / %d is wrong\n", x, d);
        std::exit(1);
      }
    }
  }
}

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 0);
  check_division(random);
  for (int i = 0; i < count; ++i) {
    const Case c = random_case(random);
    walk<Walk::kKeysOfQueries>(c);
    walk<Walk::kQueriesOfKeys>(c);
  }
  std::printf("%d problems walked\n", count);
  return 0;
}

}  // namespace
}  // namespace jax_natten

int main(int argc, char** argv) { return jax_natten::main(argc, argv); }
