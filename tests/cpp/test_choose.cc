// Chooses tiles of the tensor-core kernels for random problems, and for one whose tiles are as long as they may be.
// Meant to be compiled with sanitizers: what it proves is that searches stay within their tables. Prints what does not
// fit.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../../cuda/sm80/forward_plan.h"
#include "../../cuda/sm80/forward_rank.h"
#include "../../cuda/sm90/choose.h"
#include "../gpu/problems.h"

namespace jax_natten {
namespace {

int count_wrong(const FusedShape& shape) {
  int wrong = 0;
  for (const sm90::Candidate& candidate : sm90::rank_plans(shape, sm90::kProcessors, 8)) {
    const char* reason = sm90::why_not(shape, candidate.plan);
    if (reason != nullptr) std::printf("%s\n", reason);
    wrong += reason != nullptr;
  }
  for (const sm80::Plan& plan : sm80::rank_forward_plans(shape, 8)) {
    sm80::Plan again;
    const auto fields = sm80::encode_plan(plan);
    const char* reason = sm80::why_not_forward_plan(shape, plan);
    if (reason == nullptr) reason = sm80::decode_plan({fields.data(), fields.size()}, again);
    if (reason == nullptr && sm80::encode_plan(again) != fields) reason = "changes on the wire";
    const sm80::PlanWork work = sm80::count_work(shape, plan);
    if (reason == nullptr && !(work.pairs <= work.computed_pairs && work.computed_pairs < work.cost)) {
      reason = "computes too little";
    }
    if (reason != nullptr) std::printf("%s\n", reason);
    wrong += reason != nullptr;
  }
  return wrong;
}

FusedShape long_axis() {
  FusedShape shape;
  shape.dtype = DType::kFloat16;
  shape.neighborhood.rank = 1;
  for (Axis& axis : shape.neighborhood.axes) axis = Axis{1, 1, 1, 1, false};
  shape.neighborhood.axes[kMaxRank - 1] = Axis{512, 15, 1, 1, false};
  shape.batch = 2;
  shape.heads = shape.kv_heads = 4;
  shape.dim = shape.value_dim = 32;
  return shape;
}

// As it is asked about while its grid is not known: whatever fits some grid fits.
int count_wrong_of_unknown_grid() {
  const FusedShape shape = long_axis();
  int wrong = 0;
  for (const sm80::Plan& plan : sm80::rank_forward_plans(shape, 8)) {  // of every structure
    FusedShape unknown = shape;
    unknown.neighborhood.axes[kMaxRank - 1].length = 0;
    const char* reason = sm80::why_not_forward_plan(unknown, plan);
    if (reason != nullptr) std::printf("%s\n", reason);
    wrong += reason != nullptr;
  }
  return wrong;
}

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  int wrong = count_wrong(long_axis()) + count_wrong_of_unknown_grid();
  for (int seed = 0; seed < count; ++seed) {
    std::mt19937 random{unsigned(seed)};
    driver::Problem problem = driver::random_problem(random, seed);
    if (seed % 3 == 0) driver::extend_problem(random, problem);
    wrong += count_wrong(problem.shape);
  }
  return wrong != 0;
}

}  // namespace
}  // namespace jax_natten

int main(int argc, char** argv) { return jax_natten::main(argc, argv); }
