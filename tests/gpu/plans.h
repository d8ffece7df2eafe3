// Plans of the sm_90 forward kernels: random ones, and as text.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/sm90/plan.h"

namespace jax_natten::driver {

using sm90::Plan;
using sm90::Structure;

constexpr const char* kStructures[] = {"wide", "warp", "middle"};  // by their numbers

// wide|warp|middle:q0,q1,q2:p0,p1,p2:k0,k1,k2[:heads,slots,stages] (query tile, part, key tile)
inline std::string to_string(const Plan& plan) {
  char text[128];
  const auto three = [](const int (&x)[kMaxRank]) {
    return std::to_string(x[0]) + "," + std::to_string(x[1]) + "," + std::to_string(x[2]);
  };
  std::snprintf(text, sizeof(text), "%s:%s:%s:%s:%d,%d,%d", kStructures[int(plan.structure)],
                three(plan.query_tile).c_str(), three(plan.query_part).c_str(), three(plan.key_tile).c_str(),
                plan.heads, plan.slots, plan.stages);
  return text;
}

inline Plan parse_plan(const char* text) {
  Plan plan;
  char structure[8];
  int *q = plan.query_tile, *p = plan.query_part, *k = plan.key_tile;
  const int fields = std::sscanf(text, "%6[a-z]:%d,%d,%d:%d,%d,%d:%d,%d,%d:%d,%d,%d", structure, q, q + 1, q + 2, p,
                                 p + 1, p + 2, k, k + 1, k + 2, &plan.heads, &plan.slots, &plan.stages);
  if (fields != 10 && fields != 13) {
    std::printf("not a plan: %s\n", text);
    std::exit(2);
  }
  for (int n = 0; n < 3; ++n) {
    if (!std::strcmp(structure, kStructures[n])) plan.structure = Structure(n);
  }
  return plan;
}

// A random factorisation into tiles of at most `most` in all; axes that do not exist get 1.
inline std::vector<int> random_tile(std::mt19937& random, int rank, int most) {
  std::vector<int> tile(3, 1);
  std::vector<int> axes;
  for (int a = 3 - rank; a < 3; ++a) axes.push_back(a);
  std::shuffle(axes.begin(), axes.end(), random);
  int left = most;
  for (size_t i = 0; i < axes.size(); ++i) {
    const bool all = i + 1 == axes.size() && random() % 4 != 0;
    tile[axes[i]] = all ? left : 1 + random() % (i + 1 == axes.size() ? left : std::min(left, 16));
    left /= tile[axes[i]];
  }
  return tile;
}

inline Plan random_plan(std::mt19937& random, const FusedShape& shape) {
  const int rank = shape.neighborhood.rank;
  Plan plan;
  const auto set = [](int (&tile)[kMaxRank], const std::vector<int>& from) {
    std::copy(from.begin(), from.end(), tile);
  };
  if (shape.dim <= 64 && random() % 2) {
    plan.structure = Structure::kWarp;
    plan.heads = shape.dim == 32 && shape.group() == 1 && shape.heads % 2 == 0 && random() % 2 ? 2 : 1;
    plan.slots = 1 + random() % 4;
    plan.stages = 1 + random() % 4;
    for (int attempt = 0; attempt < 100; ++attempt) {
      set(plan.query_part, random_tile(random, rank, 16));
      set(plan.query_tile, random_tile(random, rank, (random() % 2 ? 19 : 10) / plan.heads));
      for (int a = 0; a < kMaxRank; ++a) plan.query_tile[a] *= plan.query_part[a];
      set(plan.key_tile, random_tile(random, rank, 100 + random() % 400));
      if (sm90::why_not(shape, plan) == nullptr) return plan;
    }
    plan = Plan();
  }
  const int dim = sm90::compiled_head_dim(shape.dim);
  set(plan.query_part, random_tile(random, rank, 64));
  if (random() % 2) {
    plan.structure = Structure::kMiddle;
    set(plan.key_tile, random_tile(random, rank, dim <= 96 ? (random() % 2 ? 112 : 80) : random() % 2 ? 80 : 64));
    std::copy(plan.query_part, plan.query_part + kMaxRank, plan.query_tile);
    if (sm90::why_not(shape, plan) == nullptr) return plan;
    plan.structure = Structure::kWide;
  }
  set(plan.key_tile, random_tile(random, rank, dim <= 128 ? 128 : dim == 192 ? 96 : 64));
  std::copy(plan.query_part, plan.query_part + kMaxRank, plan.query_tile);
  plan.query_tile[kMaxRank - 1 - random() % rank] *= 2;
  return plan;
}

}  // namespace jax_natten::driver
