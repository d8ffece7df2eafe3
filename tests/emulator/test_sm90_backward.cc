// The sm_90 backward against the definition, on the CPU.
//
//   test_sm90_backward [N [SEED]]   a problem for the rings, and N random ones under random plans (default 30, 0), half
//                                   of them with additional keys or a bias
//   test_sm90_backward hard [SEED]  those of the hard problems that are not too large, under random plans
//   test_sm90_backward extended [N [SEED]]  random problems with additional keys or a bias alone
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../cuda/common/workspace.h"
#include "../../cuda/sm80/backward_instances.h"
#include "../../cuda/sm80/forward_shape.h"
#include "../../cuda/sm90/backward.h"
#include "../../cuda/sm90/backward_additional.h"
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

// Error as a fraction of the tensor's length, but of no less than a thousandth of that of values of ordinary size:
// gradients that cancel out are not asked to be exact.
double error_of(const std::vector<double>& reference, DType dtype, const void* data, double ordinary = 1) {
  double squares = 0, reference_squares = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = to_double(dtype, data, int64_t(i)) - reference[i];
    if (!(std::fabs(d) < INFINITY)) return INFINITY;
    squares += d * d;
    reference_squares += reference[i] * reference[i];
  }
  return std::sqrt(squares / std::max(reference_squares, 1e-6 * ordinary * ordinary * double(reference.size())));
}

// Whether the kernels of the gradient of the bias, which are those of sm80, are linked for a head dimension.
bool bias_is_linked(const FusedShape& shape) {
  static constexpr decltype(&sm80::backward_d32) kInstances[] = {sm80::backward_d32,  sm80::backward_d64,
                                                                 sm80::backward_d96,  sm80::backward_d128,
                                                                 sm80::backward_d192, sm80::backward_d256};
  const int dim = sm80::forward_dim(2, shape.dim);
  for (int i = 0; i < 6; ++i) {
    if (sm80::kForwardDims[i] != dim) continue;
    return kInstances[i](shape.dtype, sm80::Precision::kTf32, sm80::Pass::kBias).function != nullptr;
  }
  return false;
}

cudaError_t launch(const FusedBackwardParams& params, const sm90::BackwardPlan& plan) {
  if (!params.has_bias() || bias_is_linked(params)) return sm90::launch_backward(params, plan, nullptr);
  for (const Walk pass : {sm90::kQueryPass, sm90::kKeyPass}) {
    if (const cudaError_t error = sm90::launch_backward_pass(pass, params, plan, nullptr)) return error;
  }
  return params.additional > 0 ? sm90::launch_additional(params, nullptr) : cudaSuccess;
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
  const int64_t additional = shape.batch * shape.additional * shape.kv_heads * shape.dim;
  const int64_t entries = shape.bias_batch * shape.heads * shape.neighborhood.bias_size();
  std::vector<std::unique_ptr<emulator::Memory>> inputs, outputs;
  const auto input = [&](DType dtype, int64_t count, double factor = 1) {
    inputs.push_back(std::make_unique<emulator::Memory>(element_bytes(dtype) * count));
    fill_normal(dtype, inputs.back()->data(), count, random, factor);
    return inputs.back()->data();
  };
  const auto output = [&](DType dtype, int64_t count) {
    outputs.push_back(std::make_unique<emulator::Memory>(element_bytes(dtype) * count, 0xFF));
    return outputs.back()->data();
  };
  FusedBackwardParams params = {};
  static_cast<FusedShape&>(params) = shape;
  params.query = input(shape.dtype, queries);
  params.key = input(shape.dtype, keys);
  params.value = input(shape.dtype, keys);
  params.d_out = input(shape.dtype, queries);
  params.d_lse = input(DType::kFloat32, rows, random() % 2 ? 0.5 : 0);
  params.additional_keys = input(shape.dtype, additional);
  params.additional_values = input(shape.dtype, additional);
  params.bias = input(DType::kFloat32, entries);
  {
    FusedForwardParams forward = {};
    static_cast<FusedShape&>(forward) = shape;
    forward.query = params.query;
    forward.key = params.key;
    forward.value = params.value;
    forward.additional_keys = params.additional_keys;
    forward.additional_values = params.additional_values;
    forward.bias = params.bias;
    const ForwardReference reference = reference_forward(forward);
    void* const out = input(shape.dtype, queries, 0);
    void* const lse = input(DType::kFloat32, rows, 0);
    for (int64_t i = 0; i < queries; ++i) from_double(shape.dtype, reference.out[i], out, i);
    for (int64_t i = 0; i < rows; ++i) from_double(DType::kFloat32, reference.lse[i], lse, i);
    params.out = out;
    params.lse = lse;
  }
  params.d_query = output(shape.dtype, queries);
  params.d_key = output(shape.dtype, keys);
  params.d_value = output(shape.dtype, keys);
  params.d_additional_keys = output(shape.dtype, additional);
  params.d_additional_values = output(shape.dtype, additional);
  params.d_bias = output(DType::kFloat32, entries);
  params.workspace_size = fused_backward_workspace(shape);
  params.workspace = output(DType::kFloat32, params.workspace_size);
  emulator::Settings settings;
  settings.seed = seed;
  settings.processors = 1 + int(random() % 3);
  emulator::configure(settings);
  const auto begin = std::chrono::steady_clock::now();
  if (const cudaError_t error = launch(params, plan)) {
    std::printf(" FAILED: %s\n", cudaGetErrorString(error));
    return false;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const BackwardReference reference = reference_backward(params);
  std::vector<std::pair<const char*, double>> errors = {
      {"dq", error_of(reference.d_query, shape.dtype, params.d_query)},
      {"dk", error_of(reference.d_key, shape.dtype, params.d_key)},
      {"dv", error_of(reference.d_value, shape.dtype, params.d_value)}};
  if (shape.additional > 0) {
    errors.push_back({"dak", error_of(reference.d_additional_keys, shape.dtype, params.d_additional_keys)});
    errors.push_back({"dav", error_of(reference.d_additional_values, shape.dtype, params.d_additional_values)});
  }
  if (shape.has_bias() && bias_is_linked(shape)) {
    // A sum over queries of products of rows.
    const double terms = double(shape.batch / shape.bias_batch * shape.neighborhood.positions()) * shape.dim;
    errors.push_back({"db", error_of(reference.d_bias, DType::kFloat32, params.d_bias, std::sqrt(terms))});
  }
  bool intact = true, good = true;
  for (const auto& array : outputs) intact = intact && array->intact();
  for (const auto& [name, error] : errors) {
    std::printf(" %s %.1e", name, error);
    good = good && error < (shape.dtype == DType::kFloat16 ? 1.5e-3 : 1e-2);
  }
  good = good && intact;
  std::printf("%s %.1f s %s\n", intact ? "" : " written outside", seconds.count(), good ? "ok" : "WRONG");
  return good;
}

// Without queries the sums over them are zero.
bool check_empty() {
  FusedShape shape = driver::make_problem("empty", DType::kBFloat16, 2, 2, 1, 32, {0}, {1}, {1}, {1}).shape;
  shape.additional = 3;
  shape.bias_batch = 1;
  emulator::Memory keys(2 * 192, 0xFF), values(2 * 192, 0xFF), bias(4 * 2, 0xFF);
  FusedBackwardParams params = {};
  static_cast<FusedShape&>(params) = shape;
  params.d_additional_keys = keys.data();
  params.d_additional_values = values.data();
  params.d_bias = bias.data();
  const std::vector<double> zeros(192, 0);
  const bool good = sm90::launch_backward(params, {}, nullptr) == cudaSuccess &&
                    largest_difference(zeros, shape.dtype, keys.data()) == 0 &&
                    largest_difference(zeros, shape.dtype, values.data()) == 0 &&
                    largest_difference({0, 0}, DType::kFloat32, bias.data()) == 0;
  std::printf("empty %s\n", good ? "ok" : "WRONG");
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
    const bool extended = argc > 1 && std::strcmp(argv[1], "extended") == 0;
    if (extended) --argc, ++argv;
    const int count = argc > 1 ? std::atoi(argv[1]) : 30;
    const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
    wrong += !check_empty();
    // Each part of a tile passes over more column tiles than the ring holds.
    const Problem passed_over =
        driver::make_problem("passed over", DType::kBFloat16, 1, 2, 1, 64, {256}, {3}, {1}, {1});
    wrong +=
        !check(passed_over, driver::parse_backward_plan("large:1,1,128:1,1,64:1,1,4/large:1,1,128:1,1,64:1,1,4"), seed);
    total += 2;
    for (int i = 0; i < count; ++i) {
      std::mt19937 random(seed + unsigned(i));
      Problem problem = driver::random_problem(random, i, {150, 18, 8});
      if (extended || i % 2 == 1) driver::extend_problem(random, problem);
      check_under_random_plan(problem, random, seed + unsigned(i));
    }
  }
  std::printf("%d of %d problems wrong\n", wrong, total);
  return wrong != 0;
}

}  // namespace
}  // namespace jax_natten::testing

int main(int argc, char** argv) { return jax_natten::testing::main(argc, argv); }
