// Walks over queries, keys and pairs exactly as the direct CUDA kernels do, through the header that they use, and
// compares with the definition of the windows. Exits with 1 and a description on the first difference.
//
//   test_naive_geometry [random problems [seed]]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../cuda/common/params.h"
#include "../../cuda/naive/geometry.h"

namespace jax_natten::naive {
namespace {

[[noreturn]] void fail(const FusedShape& p, const std::string& what) {
  std::printf("batch %lld heads %d / %d:", static_cast<long long>(p.batch), p.heads, p.kv_heads);
  for (const Axis& axis : p.neighborhood.axes) {
    std::printf(" [x%d k%d s%d d%d%s]", axis.length, axis.window, axis.stride, axis.dilation,
                axis.causal ? " causal" : "");
  }
  std::printf(" %s\n", what.c_str());
  std::exit(1);
}

struct Coordinates {
  int x[kMaxRank];
};

Coordinates coordinates(const Neighborhood& window, int64_t position) {
  Coordinates at;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    at.x[a] = int(position % window.axes[a].length);
    position /= window.axes[a].length;
  }
  return at;
}

// Whether a query sees a key, and if so the key's slot and bias entry.
bool sees(const Neighborhood& window, int64_t query, int64_t key, int64_t& slot, int64_t& entry) {
  const Coordinates q = coordinates(window, query), k = coordinates(window, key);
  slot = entry = 0;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = window.axes[a];
    if (q.x[a] % axis.dilation != k.x[a] % axis.dilation) return false;
    const int i = q.x[a] / axis.dilation, j = k.x[a] / axis.dilation;
    const Interval keys = window_of_query(axis, i, group_length(axis, q.x[a] % axis.dilation));
    if (j < keys.begin || j >= keys.end) return false;
    slot = slot * axis.window + (j - keys.begin);
    entry = entry * (2 * axis.window - 1) + (j - i + axis.window - 1);
  }
  return true;
}

void check_items(const FusedShape& p, Items items) {
  const Geometry geometry(p, items, 64);
  const int heads = items == Items::kQueries ? p.heads : p.kv_heads;
  std::set<std::vector<int64_t>> found;
  for (int64_t ordinal = 0; ordinal < geometry.items(); ++ordinal) {
    const Item item = geometry.item(ordinal);
    if (!item.valid || item.head < 0 || item.head >= heads) fail(p, "an item is out of range");
    found.insert({item.batch, item.head, item.place.position});
    const Place place = geometry.place(item.place.position);
    const Coordinates at = coordinates(p.neighborhood, item.place.position);
    for (int a = 0; a < kMaxRank; ++a) {
      const Axis& axis = p.neighborhood.axes[a];
      if (item.place.group[a] != at.x[a] % axis.dilation || item.place.index[a] != at.x[a] / axis.dilation ||
          item.place.length[a] != group_length(axis, item.place.group[a]) || place.group[a] != item.place.group[a] ||
          place.index[a] != item.place.index[a] || place.length[a] != item.place.length[a]) {
        fail(p, "an item is at the wrong place");
      }
    }
  }
  if (int64_t(found.size()) != p.batch * heads * p.neighborhood.positions()) fail(p, "items are missing");
  if (geometry.item(geometry.items()).valid) fail(p, "an item past the end is valid");
}

// Follows one query's keys: positions, bias entries and slots that the streams of the kernels yield.
void check_keys(const FusedShape& p, const Geometry& geometry, int64_t query) {
  const Neighborhood& window = p.neighborhood;
  const std::vector<char> memory(1);
  const Place place = geometry.place(query);
  const Box box = keys_of_query(geometry, place);
  const int64_t stride = 3;  // elements per position
  const Steps key_steps = row_steps(window, stride), bias = bias_steps(window, 1), slots = slot_steps(window);
  const char* base = memory.data();
  Stream<char> key(base + box.origin * stride, window.axes[2].dilation * stride, key_steps.outer);
  Stream<char> entry(base + bias_index(window, place.index, box.begin), 1, bias.outer);
  Stream<char> slot(base, 1, slots.outer);
  Cursor cursor;
  int64_t expected_slot, expected_entry;
  for (int64_t position = 0; position < window.positions(); ++position) {
    if (!sees(window, query, position, expected_slot, expected_entry)) continue;
    // Keys come in row-major order of their slots; that of their positions is the same.
    if (!cursor.valid(box)) fail(p, "a walk over keys ends early");
    if (key.at - base != position * stride) fail(p, "a walk meets the wrong key");
    if (entry.at - base != expected_entry) fail(p, "a key has the wrong bias entry");
    if (slot.at - base != expected_slot) fail(p, "a key has the wrong slot");
    cursor.advance(box, key, entry, slot);
  }
  for (int more = 0; more < 5; ++more) {
    if (cursor.valid(box)) fail(p, "a walk over keys goes on");
    cursor.advance(box, key, entry, slot);
  }
}

void check_queries(const FusedShape& p, const Geometry& geometry, int64_t key) {
  const Neighborhood& window = p.neighborhood;
  const std::vector<char> memory(1);
  const Place place = geometry.place(key);
  const Box box = queries_of_key(geometry, place);
  const Steps query_steps = row_steps(window, 1), bias = bias_steps(window, -1);
  const char* base = memory.data();
  Stream<char> query(base + box.origin, window.axes[2].dilation, query_steps.outer);
  Stream<char> entry(base + bias_index(window, box.begin, place.index), -1, bias.outer);
  Cursor cursor;
  int64_t slot, expected_entry;
  for (int64_t position = 0; position < window.positions(); ++position) {
    if (!sees(window, position, key, slot, expected_entry)) continue;
    if (!cursor.valid(box)) fail(p, "a walk over queries ends early");
    if (query.at - base != position) fail(p, "a walk meets the wrong query");
    if (entry.at - base != expected_entry) fail(p, "a query has the wrong bias entry");
    cursor.advance(box, query, entry);
  }
  if (cursor.valid(box)) fail(p, "a walk over queries goes on");
}

// The bias pass: every pair once, and no entry of the table at two remainders.
void check_pairs(const FusedShape& p, const Geometry& geometry) {
  const Neighborhood& window = p.neighborhood;
  std::vector<int64_t> owner(size_t(window.bias_size()), -1);
  for (int64_t query = 0; query < window.positions(); ++query) {
    std::set<int64_t> keys;
    for (int64_t number = 0; number < window.window_size(); ++number) {
      int remainder[kMaxRank];
      int64_t rest = number;
      for (int a = kMaxRank - 1; a >= 0; --a) {
        remainder[a] = int(rest % window.axes[a].window);
        rest /= window.axes[a].window;
      }
      const Pair pair = pair_at(geometry, window, geometry.place(query), remainder);
      if (!pair.valid) continue;
      int64_t slot, entry;
      if (!sees(window, query, pair.key, slot, entry) || entry != pair.entry) fail(p, "a pair is wrong");
      keys.insert(pair.key);
      if (owner[size_t(entry)] >= 0 && owner[size_t(entry)] != number) fail(p, "an entry has two owners");
      owner[size_t(entry)] = number;
    }
    int64_t count = 1;
    const Box box = keys_of_query(geometry, geometry.place(query));
    for (int a = 0; a < kMaxRank; ++a) count *= box.count[a];
    if (int64_t(keys.size()) != count) fail(p, "pairs are missing");
  }
}

void check_divisors(std::mt19937_64& random) {
  for (int n = 0; n < 100000; ++n) {
    const int64_t divisor = std::max<int64_t>(int64_t(random() >> (1 + random() % 63)), 1);
    const int64_t x = int64_t(random() >> (1 + random() % 63));
    int64_t quotient = x;
    const int64_t rest = WideDivisor(divisor).divide(quotient);
    if (quotient != x / divisor || rest != x % divisor) {
      std::printf("%lld / %lld is wrong\n", static_cast<long long>(x), static_cast<long long>(divisor));
      std::exit(1);
    }
  }
}

FusedShape random_shape(std::mt19937_64& random) {
  const auto up_to = [&](int64_t n) { return 1 + int64_t(random() % uint64_t(n)); };
  FusedShape p;
  p.batch = up_to(2);
  p.kv_heads = int(up_to(4));
  p.heads = p.kv_heads * int(up_to(3));
  p.dim = p.value_dim = 8;
  p.neighborhood.rank = int(up_to(3));
  const int longest[] = {60, 14, 9};
  for (int a = kMaxRank - p.neighborhood.rank; a < kMaxRank; ++a) {
    Axis& axis = p.neighborhood.axes[a];
    axis.length = int(up_to(longest[p.neighborhood.rank - 1]));
    axis.dilation = int(up_to(std::min(axis.length, 4)));
    axis.window = int(up_to(axis.length / axis.dilation));
    axis.stride = int(up_to(axis.window));
    axis.causal = random() % 3 == 0;
  }
  return p;
}

int run(int problems, uint64_t seed) {
  std::mt19937_64 random(seed);
  check_divisors(random);
  for (int n = 0; n < problems; ++n) {
    const FusedShape p = random_shape(random);
    check_items(p, Items::kQueries);
    check_items(p, Items::kKeys);
    const Geometry geometry(p, Items::kQueries, 64);
    for (int64_t position = 0; position < p.neighborhood.positions(); ++position) {
      check_keys(p, geometry, position);
      check_queries(p, geometry, position);
    }
    check_pairs(p, geometry);
  }
  return 0;
}

}  // namespace
}  // namespace jax_natten::naive

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  return jax_natten::naive::run(problems, seed);
}
