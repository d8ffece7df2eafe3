// The sm_90 backward against the definition, on the CPU.
//
//   test_sm90_backward [N [SEED]]   a problem for the rings, and N random ones under random plans (default 30, 0)
//   test_sm90_backward hard [SEED]  those of the hard problems that are not too large, under random plans
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../../cuda/sm90/backward.h"
#include "../gpu/backward_plans.h"
#include "../gpu/problems.h"
#include "backward_reference.h"
#include "emulator.h"

namespace jax_natten::testing {
namespace {

using driver::Problem;

void fill_normal(DType dtype, void* data, int64_t count, std::mt19937& random, double factor = 1) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) from_double(dtype, factor * normal(random), data, i);
}

// Error as a fraction of the tensor's length, but of no less than a thousandth of that of ordinary values: gradients
// that cancel out are not asked to be exact.
double error_of(const std::vector<double>& reference, DType dtype, const void* data) {
  double squares = 0, reference_squares = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = to_double(dtype, data, int64_t(i)) - reference[i];
    if (!(std::fabs(d) < INFINITY)) return INFINITY;
    squares += d * d;
    reference_squares += reference[i] * reference[i];
  }
  return std::sqrt(squares / std::max(reference_squares, 1e-6 * double(reference.size())));
}

bool check(const Problem& problem, const sm90::BackwardPlan& plan, unsigned seed) {
  const FusedShape& shape = problem.shape;
  std::printf("%-14s %s | %s seed %u", problem.name.c_str(), driver::describe(shape).c_str(),
              driver::to_string(plan).c_str(), seed);
  std::fflush(stdout);
  if (const char* reason = sm90::why_not(shape, plan)) {
    std::printf(" refused: %s\n", reason);
    return true;
  }
  std::mt19937 random(seed);
  const int64_t rows = shape.batch * shape.neighborhood.positions() * shape.heads, queries = rows * shape.dim;
  const int64_t keys = queries / shape.heads * shape.kv_heads;
  emulator::Memory query(2 * queries), key(2 * keys), value(2 * keys), out(2 * queries), lse(4 * rows),
      d_out(2 * queries), d_lse(4 * rows), d_query(2 * queries, 0xFF), d_key(2 * keys, 0xFF), d_value(2 * keys, 0xFF),
      workspace(4 * sm90::backward_workspace(shape), 0xFF);
  for (const emulator::Memory* array : {&query, &key, &value, &d_out}) {
    fill_normal(shape.dtype, array->data(), int64_t(array->bytes()) / 2, random);
  }
  fill_normal(DType::kFloat32, d_lse.data(), rows, random, random() % 2 ? 0.5 : 0);
  FusedBackwardParams params = {};
  static_cast<FusedShape&>(params) = shape;
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.out = out.data();
  params.lse = lse.data();
  params.d_out = d_out.data();
  params.d_lse = d_lse.data();
  params.d_query = d_query.data();
  params.d_key = d_key.data();
  params.d_value = d_value.data();
  params.workspace = workspace.data();
  params.workspace_size = int64_t(workspace.bytes()) / 4;
  {
    FusedForwardParams forward = {};
    static_cast<FusedShape&>(forward) = shape;
    forward.query = query.data();
    forward.key = key.data();
    forward.value = value.data();
    const ForwardReference reference = reference_forward(forward);
    for (int64_t i = 0; i < queries; ++i) from_double(shape.dtype, reference.out[i], out.data(), i);
    for (int64_t i = 0; i < rows; ++i) from_double(DType::kFloat32, reference.lse[i], lse.data(), i);
  }
  emulator::Settings settings;
  settings.seed = seed;
  settings.processors = 1 + int(random() % 3);
  emulator::configure(settings);
  const auto begin = std::chrono::steady_clock::now();
  const cudaError_t error = sm90::launch_backward(params, plan, nullptr);
  if (error != cudaSuccess) {
    std::printf(" FAILED: %s\n", cudaGetErrorString(error));
    return false;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const BackwardReference reference = reference_backward(params);
  const double errors[] = {error_of(reference.d_query, shape.dtype, d_query.data()),
                           error_of(reference.d_key, shape.dtype, d_key.data()),
                           error_of(reference.d_value, shape.dtype, d_value.data())};
  const bool intact = d_query.intact() && d_key.intact() && d_value.intact() && workspace.intact();
  const double most = *std::max_element(errors, errors + 3);
  const bool good = most < (shape.dtype == DType::kFloat16 ? 1.5e-3 : 1e-2) && intact;
  std::printf(" dq %.1e dk %.1e dv %.1e%s %.1f s %s\n", errors[0], errors[1], errors[2],
              intact ? "" : " written outside", seconds.count(), good ? "ok" : "WRONG");
  return good;
}

int main(int argc, char** argv) {
  int wrong = 0, total = 0;
  const auto check_under_random_plan = [&](const Problem& problem, std::mt19937& random, unsigned seed) {
    wrong += !check(problem, driver::random_backward_plan(random, problem.shape), seed);
    ++total;
  };
  if (argc > 1 && std::strcmp(argv[1], "hard") == 0) {
    const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
    for (unsigned causal = 0; causal < 8; ++causal) {
      for (const Problem& problem : driver::hard_problems(causal % 2 ? DType::kFloat16 : DType::kBFloat16, causal)) {
        const FusedShape& shape = problem.shape;
        const double pairs = double(shape.batch * shape.heads * shape.neighborhood.positions()) *
                             double(shape.neighborhood.window_size());
        if (pairs * shape.dim > 5e7) continue;
        std::mt19937 random(seed + causal);
        check_under_random_plan(problem, random, seed + causal);
      }
    }
  } else {
    const int count = argc > 1 ? std::atoi(argv[1]) : 30;
    const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
    // Each part of a tile passes over more column tiles than the ring holds.
    const Problem passed_over =
        driver::make_problem("passed over", DType::kBFloat16, 1, 2, 1, 64, {256}, {3}, {1}, {1});
    wrong +=
        !check(passed_over, driver::parse_backward_plan("large:1,1,128:1,1,64:1,1,4/large:1,1,128:1,1,64:1,1,4"), seed);
    ++total;
    for (int i = 0; i < count; ++i) {
      std::mt19937 random(seed + unsigned(i));
      check_under_random_plan(driver::random_problem(random, i, {150, 18, 8}), random, seed + unsigned(i));
    }
  }
  std::printf("%d of %d problems wrong\n", wrong, total);
  return wrong != 0;
}

}  // namespace
}  // namespace jax_natten::testing

int main(int argc, char** argv) { return jax_natten::testing::main(argc, argv); }
