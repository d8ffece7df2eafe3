// The sm_90 forward kernels against the definition, on the CPU.
//
//   test_sm90_forward [N [SEED]]   N random problems (default 30, 0), two of three under random plans
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../gpu/plans.h"
#include "../gpu/problems.h"
#include "cuda/sm90/choose.h"
#include "cuda/sm90/forward.h"
#include "emulator.h"
#include "reference.h"

namespace jax_natten::testing {
namespace {

using driver::Problem;

void fill_normal(DType dtype, void* data, int64_t count, std::mt19937& random) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) from_double(dtype, normal(random), data, i);
}

bool check(const Problem& problem, const sm90::Plan& plan, unsigned seed) {
  const FusedShape& shape = problem.shape;
  std::printf("%-14s %s | %s seed %u", problem.name.c_str(), driver::describe(shape).c_str(),
              driver::to_string(plan).c_str(), seed);
  std::fflush(stdout);
  if (const char* reason = sm90::why_not(shape, plan)) {
    std::printf(" refused: %s\n", reason);
    return true;
  }
  const auto begin = std::chrono::steady_clock::now();
  std::mt19937 random(seed);
  const int64_t rows = shape.batch * shape.neighborhood.positions() * shape.heads;
  const int64_t keys = rows / shape.heads * shape.kv_heads;
  emulator::Memory query(2 * rows * shape.dim), key(2 * keys * shape.dim), value(2 * keys * shape.dim),
      out(2 * rows * shape.dim, 0xFF), lse(4 * rows, 0xFF);
  fill_normal(shape.dtype, query.data(), rows * shape.dim, random);
  fill_normal(shape.dtype, key.data(), keys * shape.dim, random);
  fill_normal(shape.dtype, value.data(), keys * shape.dim, random);
  const int64_t additional = shape.batch * shape.additional * shape.kv_heads * shape.dim;
  const int64_t entries = shape.bias_batch * shape.heads * shape.neighborhood.bias_size();
  emulator::Memory additional_keys(2 * additional), additional_values(2 * additional), bias(4 * entries);
  fill_normal(shape.dtype, additional_keys.data(), additional, random);
  fill_normal(shape.dtype, additional_values.data(), additional, random);
  fill_normal(DType::kFloat32, bias.data(), entries, random);
  FusedForwardParams params = {};
  static_cast<FusedShape&>(params) = shape;
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.additional_keys = additional_keys.data();
  params.additional_values = additional_values.data();
  params.bias = bias.data();
  params.out = out.data();
  params.lse = lse.data();
  emulator::Settings settings;
  settings.seed = seed;
  settings.processors = 1 + int(random() % 3);
  emulator::configure(settings);
  const cudaError_t error = sm90::launch(params, plan, nullptr);
  if (error != cudaSuccess) {
    std::printf(" FAILED: %s\n", cudaGetErrorString(error));
    return false;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const ForwardReference reference = reference_forward(params);
  const double out_error = relative_error(reference.out, shape.dtype, out.data());
  const double lse_error = largest_difference(reference.lse, DType::kFloat32, lse.data());
  const bool intact = out.intact() && lse.intact();
  const bool good = out_error < (shape.dtype == DType::kFloat16 ? 1e-3 : 6e-3) && lse_error < 1e-3 && intact;
  std::printf(" error %.1e lse %.1e%s %.1f s %s\n", out_error, lse_error, intact ? "" : " written outside",
              seconds.count(), good ? "ok" : "WRONG");
  return good;
}

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 30;
  const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    std::mt19937 random(seed + unsigned(i));
    Problem problem = driver::random_problem(random, i, {150, 18, 8});
    if (random() % 3 == 0) driver::extend_problem(random, problem);
    sm90::Plan plan = driver::random_plan(random, problem.shape);
    if (i % 3 == 2) sm90::choose_plan(problem.shape, sm90::kProcessors, plan);  // the product's own choice
    wrong += !check(problem, plan, seed + unsigned(i));
  }
  std::printf("%d of %d problems wrong\n", wrong, count);
  return wrong != 0;
}

}  // namespace
}  // namespace jax_natten::testing

int main(int argc, char** argv) { return jax_natten::testing::main(argc, argv); }
