// What plans of a fused forward cost, by exact counts of tiles, and which are worth trying. Plain host code that needs
// no CUDA: it is the simulator, too.
#pragma once

#include <vector>

#include "../common/tile_model.h"
#include "plan.h"

namespace jax_natten::sm80 {

// Of all heads and batch elements. Pairs are those of a query and a key.
struct PlanWork {
  TileCounts tiles;  // Structure::kSmall: the key tiles are the box of a query tile, and the lists of its warps
  double pairs = 0;  // inside windows
  double computed_pairs = 0;  // padding included
  double cost = 0;            // pairs that could be computed in the time, idle warps and copies included
};

// For a plan that fits the problem.
PlanWork count_work(const FusedShape& shape, const Plan& plan);

// Up to `count` plans worth trying, the default one first. The cost tells nothing of how fast kernels get through it:
// kernels (those for small windows, and those of each number of rows) take turns, each with its cheapest plans first.
// None for a problem that no kernel takes or that is empty.
std::vector<Plan> rank_forward_plans(const FusedShape& shape, int count);

}  // namespace jax_natten::sm80
