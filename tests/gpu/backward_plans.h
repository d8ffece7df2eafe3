// Plans of the sm_90 backward: random ones, and as text.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/sm90/backward_plan.h"
#include "plans.h"

namespace jax_natten::driver {

// large|small:r0,r1,r2:p0,p1,p2:c0,c1,c2 (row tile, part, column tile)
inline std::string to_string(const sm90::PassPlan& plan) {
  char text[128];
  const int *r = plan.query_tile, *p = plan.query_part, *c = plan.key_tile;
  std::snprintf(text, sizeof(text), "%s:%d,%d,%d:%d,%d,%d:%d,%d,%d", plan.small ? "small" : "large", r[0], r[1], r[2],
                p[0], p[1], p[2], c[0], c[1], c[2]);
  return text;
}

// Those of the query and of the key pass, with a slash between.
inline std::string to_string(const sm90::BackwardPlan& plan) {
  return to_string(plan.query) + "/" + to_string(plan.key);
}

inline sm90::PassPlan parse_pass_plan(const char* text) {
  sm90::PassPlan plan;
  char size[8];
  int *r = plan.query_tile, *p = plan.query_part, *c = plan.key_tile;
  const int fields =
      std::sscanf(text, "%5s:%d,%d,%d:%d,%d,%d:%d,%d,%d", size, r, r + 1, r + 2, p, p + 1, p + 2, c, c + 1, c + 2);
  if (fields != 10) {
    std::printf("not a plan of a pass: %s\n", text);
    std::exit(2);
  }
  plan.small = std::strcmp(size, "small") == 0;
  return plan;
}

inline sm90::BackwardPlan parse_backward_plan(const std::string& text) {
  const size_t slash = std::min(text.find('/'), text.size() - 1);
  return {parse_pass_plan(text.c_str()), parse_pass_plan(text.c_str() + slash + 1)};
}

inline sm90::PassPlan random_pass_plan(std::mt19937& random, const FusedShape& shape, Walk pass) {
  const int rank = shape.neighborhood.rank, dim = sm90::compiled_head_dim(shape.dim);
  sm90::PassPlan plan;
  plan.small = sm90::has_small_shape(dim) && random() % 2;
  const sm90::PassShape compiled = sm90::pass_shape(pass, dim, plan.small);
  const std::vector<int> part = random_tile(random, rank, sm90::kPartRows);
  const std::vector<int> columns = random_tile(random, rank, compiled.columns);
  std::copy(part.begin(), part.end(), plan.query_part);
  std::copy(part.begin(), part.end(), plan.query_tile);
  std::copy(columns.begin(), columns.end(), plan.key_tile);
  plan.query_tile[kMaxRank - 1 - random() % rank] *= compiled.parts;
  return plan;
}

inline sm90::BackwardPlan random_backward_plan(std::mt19937& random, const FusedShape& shape) {
  sm90::BackwardPlan plan;
  plan.query = random_pass_plan(random, shape, sm90::kQueryPass);
  plan.key = random_pass_plan(random, shape, sm90::kKeyPass);
  return plan;
}

}  // namespace jax_natten::driver
