// Proves and times the sm_90 backward on a GPU, without JAX.
//
//   sm90_backward_driver --correctness [N [SEED]]   the hard problems, then N random ones, under random plans
//   sm90_backward_driver --random [N [SEED]]        the random ones alone, e.g. under compute-sanitizer
//   sm90_backward_driver --bench [NAME..]           the benchmark table: for each pass a known plan, and beside it the
//                                                   chooser's first three
//   sm90_backward_driver --plan NAME PLAN..         one problem under some plans, their timings interleaved
// PLAN: see backward_plans.h
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/common/workspace.h"
#include "../../cuda/naive/naive.h"
#include "../../cuda/sm90/backward.h"
#include "../../cuda/sm90/backward_choose.h"
#include "../../cuda/sm90/forward.h"
#include "backward_plans.h"
#include "device_reference.cuh"
#include "problems.h"

namespace jax_natten::driver {
namespace {

using sm90::BackwardPlan;
using sm90::PassPlan;

// Of every `step`-th row of a result: sums[0] += squares of differences, sums[1] += squares of the reference, *bad +=
// values that are no numbers.
template <typename T>
__global__ void add_errors(const T* result, const float* reference, int64_t samples, int64_t step, int dim,
                           double* sums, int* bad) {
  double squares = 0, reference_squares = 0;
  int not_numbers = 0;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < samples * dim; i += threads) {
    const float x = to_float(result[i / dim * step * dim + i % dim]), d = x - reference[i];
    not_numbers += !(fabsf(x) < INFINITY);
    squares += double(d) * d;
    reference_squares += double(reference[i]) * reference[i];
  }
  atomicAdd(sums, squares);
  atomicAdd(sums + 1, reference_squares);
  if (not_numbers) atomicAdd(bad, not_numbers);
}

template <typename Function>
void with_type(DType dtype, Function function) {
  if (dtype == DType::kFloat16) {
    function(__half());
  } else {
    function(__nv_bfloat16());
  }
}

// A problem's arrays on the GPU. Gradients are followed by guard bytes.
class Arrays {
 public:
  static constexpr int64_t kGuard = 4096;
  static constexpr uint8_t kFill = 0xA5;
  // Of problems with more rows of queries or of keys only a sample of those is compared.
  static constexpr int64_t kMostRows = 40000, kSamples = 10000;

  explicit Arrays(const FusedShape& shape) {
    static_cast<FusedShape&>(params) = shape;
    const int64_t positions = shape.batch * shape.neighborhood.positions(), rows = positions * shape.heads;
    const int64_t additional = shape.batch * shape.additional * shape.kv_heads;
    const int64_t entries = shape.bias_batch * shape.heads * shape.neighborhood.bias_size();
    params.query = normal(rows * shape.dim, 1);
    params.key = normal(positions * shape.kv_heads * shape.dim, 2);
    params.value = normal(positions * shape.kv_heads * shape.dim, 3);
    params.d_out = normal(rows * shape.dim, 4);
    params.d_lse = normal_floats(rows, 5);
    params.additional_keys = normal(additional * shape.dim, 6);
    params.additional_values = normal(additional * shape.dim, 7);
    params.bias = normal_floats(entries, 8);
    auto *out = allocate<uint16_t>(rows * shape.dim), *lse = allocate<uint16_t>(2 * rows);
    params.out = out;
    params.lse = lse;
    FusedForwardParams forward = {};
    static_cast<FusedShape&>(forward) = shape;
    forward.additional_keys = params.additional_keys;
    forward.additional_values = params.additional_values;
    forward.bias = params.bias;
    forward.query = params.query;
    forward.key = params.key;
    forward.value = params.value;
    forward.out = out;
    forward.lse = lse;
    // The direct kernel would take most of the time for large problems; sm90_driver proves the other one.
    sm90::Plan plan;
    if (rows > kMostRows && sm90::choose_plan(shape, sm90::kProcessors, plan)) {
      CHECK_CUDA(sm90::launch(forward, plan, nullptr));
    } else {
      CHECK_CUDA(naive::fused_forward(forward, nullptr));
    }
    params.d_query = add_gradient("dq", rows, shape.dim);
    params.d_key = add_gradient("dk", positions * shape.kv_heads, shape.dim);
    params.d_value = add_gradient("dv", positions * shape.kv_heads, shape.dim);
    params.d_additional_keys = add_gradient("dak", additional, shape.dim);
    params.d_additional_values = add_gradient("dav", additional, shape.dim);
    params.d_bias = add_gradient("db", entries, 1, /*wide=*/true);
    params.workspace_size = fused_backward_workspace(shape);
    params.workspace = allocate<float>(params.workspace_size);
    CHECK_CUDA(cudaDeviceSynchronize());
    clear();
  }
  ~Arrays() {
    for (void* p : allocations) cudaFree(p);
  }
  Arrays(const Arrays&) = delete;

  void clear() {
    for (const Gradient& g : gradients) CHECK_CUDA(cudaMemset(g.data, kFill, g.bytes() + kGuard));
    CHECK_CUDA(cudaMemset(params.workspace, 0xFF, 4 * params.workspace_size));
  }

  // Runs the plan twice; compares the gradients of one pass, or of both, with the reference, the two runs with each
  // other, and looks at the guard bytes. Prints a verdict.
  bool check(const BackwardPlan& plan, bool of_queries = true, bool of_keys = true) {
    if (!has_reference) make_reference();
    const size_t begin = of_queries ? 0 : 1, end = of_keys ? gradients.size() : 1;
    auto* sums = allocate<double>(2 * gradients.size());
    int* faults = allocate<int>(3);  // not numbers, guard bytes, differing words
    CHECK_CUDA(cudaMemset(sums, 0, 2 * gradients.size() * sizeof(double)));
    CHECK_CUDA(cudaMemset(faults, 0, 3 * sizeof(int)));
    clear();
    CHECK_CUDA(sm90::launch_backward(params, plan, nullptr));
    for (size_t i = begin; i < end; ++i) {
      const Gradient& g = gradients[i];
      CHECK_CUDA(cudaMemcpy(g.first_run, g.data, g.bytes(), cudaMemcpyDeviceToDevice));
      const auto add = [&](auto t) {
        add_errors<<<1024, 256>>>((const decltype(t)*)g.data, g.reference, g.samples, g.step, g.dim, sums + 2 * i,
                                  faults);
      };
      g.wide ? add(float()) : with_type(params.dtype, add);
      count_other_bytes<<<1, 256>>>(g.data + g.bytes(), kGuard, kFill, faults + 1);
    }
    clear();
    CHECK_CUDA(sm90::launch_backward(params, plan, nullptr));
    for (size_t i = begin; i < end; ++i) {
      const Gradient& g = gradients[i];
      count_different_words<<<1024, 256>>>((uint32_t*)g.data, (uint32_t*)g.first_run, g.bytes() / 4, faults + 2);
    }
    std::vector<double> s(2 * gradients.size());
    int f[3];
    CHECK_CUDA(cudaMemcpy(s.data(), sums, s.size() * sizeof(double), cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(f, faults, sizeof(f), cudaMemcpyDeviceToHost));
    bool good = f[0] == 0 && f[1] == 0 && f[2] == 0;
    for (size_t i = begin; i < end; ++i) {
      const Gradient& g = gradients[i];
      if (g.rows == 0) continue;
      // Gradients that cancel out are not asked to be exact. That of the bias sums products of rows over queries.
      const double terms =
          g.wide ? double(params.batch / params.bias_batch * params.neighborhood.positions()) * params.dim : 1;
      const double error = std::sqrt(s[2 * i] / std::max(s[2 * i + 1], 1e-6 * terms * double(g.samples) * g.dim));
      good = good && error < (params.dtype == DType::kFloat16 ? 2e-3 : 1e-2);
      std::printf(" %s %.1e", g.name, error);
    }
    std::printf(" nan %d guard %d rerun %d %s", f[0], f[1], f[2], good ? "ok" : "WRONG");
    return good;
  }

  FusedBackwardParams params = {};

 private:
  struct Gradient {
    const char* name;
    int64_t rows;
    int dim;
    bool wide;  // float
    uint8_t *data, *first_run;
    int64_t step, samples;
    float* reference;

    int64_t bytes() const { return rows * dim * (wide ? 4 : 2); }
  };

  template <typename T>
  T* allocate(int64_t count) {
    void* p;
    CHECK_CUDA(cudaMalloc(&p, std::max<int64_t>(count * sizeof(T), 16)));
    allocations.push_back(p);
    return static_cast<T*>(p);
  }
  void* normal(int64_t count, int seed) {
    void* p = allocate<uint16_t>(count);
    with_type(params.dtype, [&](auto t) { fill_normal<<<1024, 256>>>((decltype(t)*)p, count, seed); });
    return p;
  }
  float* normal_floats(int64_t count, int seed) {
    auto* p = allocate<float>(count);
    fill_normal<<<1024, 256>>>(p, count, seed);
    return p;
  }
  void* add_gradient(const char* name, int64_t rows, int dim, bool wide = false) {
    Gradient g = {name, rows, dim, wide, nullptr, nullptr, 1, 0, nullptr};
    g.data = allocate<uint8_t>(g.bytes() + kGuard);
    g.first_run = allocate<uint8_t>(g.bytes());
    if (rows > kMostRows && !wide) g.step = rows / kSamples | 1;
    g.samples = (rows + g.step - 1) / g.step;
    gradients.push_back(g);
    return g.data;
  }
  void make_reference() {
    has_reference = true;
    for (Gradient& g : gradients) g.reference = allocate<float>(g.samples * g.dim);
    with_type(params.dtype, [&](auto t) {
      using T = decltype(t);
      const auto blocks = [](const Gradient& g) { return unsigned((g.samples * 32 + 255) / 256); };
      const Gradient &dq = gradients[0], &dk = gradients[1], &dak = gradients[3], &db = gradients[5];
      float *dv = gradients[2].reference, *dav = gradients[4].reference;
      reference_backward<T, kOfQueries><<<blocks(dq), 256>>>(params, dq.step, dq.reference, nullptr);
      reference_backward<T, kOfKeys><<<blocks(dk), 256>>>(params, dk.step, dk.reference, dv);
      if (dak.rows > 0) {
        reference_backward<T, kOfAdditional><<<blocks(dak), 256>>>(params, dak.step, dak.reference, dav);
      }
      if (db.rows > 0) reference_bias<T><<<blocks(db), 256>>>(params, db.reference);
    });
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  std::vector<void*> allocations;
  std::vector<Gradient> gradients;  // of queries; of keys, values, and what all queries share
  bool has_reference = false;
};

// Of the forward, times 2.5: five products for the forward's two.
double useful_flops(const FusedShape& shape) {
  double pairs = double(shape.batch * shape.heads);
  for (const Axis& axis : shape.neighborhood.axes) {
    double seen = 0;
    for (int group = 0; group < axis.dilation; ++group) {
      const int length = group_length(axis, group);
      for (int i = 0; i < length; ++i) {
        const Interval w = window_of_query(axis, i, length);
        seen += w.end - w.begin;
      }
    }
    pairs *= seen;
  }
  return 10 * pairs * shape.dim;
}

// Times the plans of a pass in turns, so that clocks and temperature treat them alike. Prints the medians of the rounds
// and returns the plan with the least.
PassPlan bench_pass(Arrays& arrays, const std::string& name, Walk pass, const std::vector<PassPlan>& plans,
                    const BackwardPlan& rest, float& best) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  const bool query = pass == sm90::kQueryPass;
  const auto whole = [&](const PassPlan& plan) {
    return query ? BackwardPlan{plan, rest.key} : BackwardPlan{rest.query, plan};
  };
  const auto milliseconds = [&](const PassPlan& plan, int launches) {
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i) {
      CHECK_CUDA(sm90::launch_backward_pass(pass, arrays.params, whole(plan), nullptr));
    }
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaDeviceSynchronize());
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms / launches;
  };
  constexpr int kRounds = 5;
  std::vector<std::vector<float>> times(plans.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < plans.size(); ++i) {
      const float one = round == 0 ? milliseconds(plans[i], 1) : times[i][0];
      times[i].push_back(milliseconds(plans[i], std::max(1, std::min(50, int(15 / one)))));
    }
  }
  size_t fastest = 0;
  best = INFINITY;
  for (size_t i = 0; i < plans.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    const float median = times[i][kRounds / 2];
    if (median < best) fastest = i, best = median;
    const double expected = sm90::predict_pass(pass, arrays.params, plans[i], sm90::kProcessors).seconds;
    std::printf("%-20s %-5s %-36s median %8.4f best %8.4f ms (model %8.4f)", name.c_str(), query ? "query" : "key",
                to_string(plans[i]).c_str(), median, times[i][0], 1e3 * expected);
    arrays.check(whole(plans[i]), query, !query);
    std::printf("\n");
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  return plans[fastest];
}

// The passes do not depend on each other's tiles: plans are timed per pass. `chosen`: of the chooser's first as well.
void bench(const Problem& problem, const std::vector<BackwardPlan>& asked, int chosen) {
  BackwardPlan first;
  if (const char* reason = sm90::why_not_backward(problem.shape)) {
    std::printf("%-20s %s\n", problem.name.c_str(), reason);
    return;
  }
  sm90::choose_backward_plan(problem.shape, sm90::kProcessors, first);
  Arrays arrays(problem.shape);
  BackwardPlan fastest;
  float times[2];
  for (const Walk pass : {sm90::kQueryPass, sm90::kKeyPass}) {
    std::vector<PassPlan> plans;
    const auto add = [&](const PassPlan& plan) {
      const auto same = [&](const PassPlan& other) { return to_string(other) == to_string(plan); };
      if (std::any_of(plans.begin(), plans.end(), same)) return;
      if (const char* reason = sm90::why_not_pass(pass, problem.shape, plan)) {
        std::printf("%-20s %s: %s\n", problem.name.c_str(), to_string(plan).c_str(), reason);
        return;
      }
      plans.push_back(plan);
    };
    for (const BackwardPlan& plan : asked) add(pass == sm90::kQueryPass ? plan.query : plan.key);
    for (const auto& candidate : sm90::rank_pass_plans(pass, problem.shape, sm90::kProcessors, chosen)) {
      add(candidate.plan);
    }
    if (plans.empty()) return;
    PassPlan& best = pass == sm90::kQueryPass ? fastest.query : fastest.key;
    best = bench_pass(arrays, problem.name, pass, plans, first, times[pass == sm90::kKeyPass]);
  }
  std::printf("%-20s fastest %s: %.4f + %.4f = %.4f ms, %.1f TFLOP/s\n", problem.name.c_str(),
              to_string(fastest).c_str(), times[0], times[1], times[0] + times[1],
              useful_flops(problem.shape) / (times[0] + times[1]) * 1e-9);
}

// Plans of the benchmark problems: fewest tiles.
const std::map<std::string, const char*>& known_plans() {
  static const std::map<std::string, const char*> plans = {
      // clang-format off
      {"flux_s1", "large:1,8,16:1,8,8:1,16,8/large:1,8,16:1,8,8:1,8,8"},
      {"flux_s16", "large:1,16,8:1,16,4:1,16,8/large:1,16,8:1,16,4:1,16,4"},
      {"hunyuan_s1", "large:8,16,1:8,8,1:4,4,8/large:2,16,4:2,8,4:4,4,4"},
      {"hunyuan_s16_8_8", "large:2,8,8:2,8,4:2,8,8/large:2,8,8:2,8,4:2,8,4"},
      {"cosmos_s1", "large:16,8,1:16,4,1:16,1,8/large:16,4,2:16,4,1:16,4,1"},
      {"cosmos_s1_8_16", "large:16,4,2:16,4,1:16,8,1/large:16,4,2:16,4,1:16,4,1"},
      {"cosmos_w16_32_48", "large:16,1,8:16,1,4:16,8,1/large:16,2,4:16,1,4:16,1,4"},
      {"cosmos2_s1_4_8", "large:16,4,2:16,4,1:16,4,2/large:16,4,2:16,4,1:16,4,1"},
      {"seq32k_w2048", "large:1,1,128:1,1,64:1,1,128/large:1,1,128:1,1,64:1,1,64"},
      {"seq32k_w2048_s256", "large:1,1,128:1,1,64:1,1,128/large:1,1,128:1,1,64:1,1,64"},
      {"seq32k_w2048_causal", "large:1,1,128:1,1,64:1,1,128/large:1,1,128:1,1,64:1,1,64"},
      {"seq32k_gqa8", "large:1,1,128:1,1,64:1,1,128/large:1,1,128:1,1,64:1,1,64"},
      {"dense16k_d128", "large:1,1,128:1,1,64:1,1,128/large:1,1,128:1,1,64:1,1,64"},
      {"dense16k_d64", "large:1,1,128:1,1,64:1,1,128/large:1,1,128:1,1,64:1,1,112"},
      {"nat_56", "small:1,8,8:1,8,8:1,16,4/small:1,8,8:1,8,8:1,16,4"},
      {"nat_28", "small:1,8,8:1,8,8:1,8,8/small:1,8,8:1,8,8:1,8,8"},
      {"nat_14", "small:1,16,4:1,16,4:1,16,4/small:1,16,4:1,16,4:1,16,4"},
      {"nat_7", "small:1,8,8:1,8,8:1,8,8/small:1,8,8:1,8,8:1,8,8"},
      {"dinat_56_d8", "small:1,8,8:1,8,8:1,8,8/small:1,8,8:1,8,8:1,8,8"},
      {"dinat_28_d4", "small:1,8,8:1,8,8:1,8,8/small:1,8,8:1,8,8:1,8,8"},
      {"hdit_64_k13", "small:1,16,4:1,16,4:1,4,16/small:1,8,8:1,8,8:1,8,8"},
      {"hdit_64_k13_d4", "small:1,16,4:1,16,4:1,16,4/small:1,16,4:1,16,4:1,16,4"},
      {"seq4k_w127", "small:1,1,64:1,1,64:1,1,64/small:1,1,64:1,1,64:1,1,64"},
      {"weather", "small:8,2,4:8,2,4:4,8,2/small:8,4,2:8,4,2:4,2,8"},
      {"vae_k3_7_7", "small:2,4,8:2,4,8:4,2,8/small:2,4,8:2,4,8:2,2,16"},
      // clang-format on
  };
  return plans;
}

bool check_problem(const Problem& problem, const BackwardPlan& plan) {
  if (const char* reason = sm90::why_not(problem.shape, plan)) {
    std::printf("%-18s refused: %s\n", problem.name.c_str(), reason);
    return true;
  }
  Arrays arrays(problem.shape);
  std::printf("%-18s", problem.name.c_str());
  std::fflush(stdout);
  const bool good = arrays.check(plan);
  std::printf("  %s | %s\n", describe(problem.shape).c_str(), to_string(plan).c_str());
  return good;
}

int run_correctness(int count, unsigned seed, bool hard) {
  std::mt19937 random(seed);
  int wrong = 0, total = 0;
  const auto check = [&](const Problem& problem) {
    wrong += !check_problem(problem, random_backward_plan(random, problem.shape));
    ++total;
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (unsigned causal = 0; hard && causal < 8; ++causal) {
      for (const Problem& problem : hard_problems(dtype, causal)) check(problem);
    }
  }
  for (int i = 0; i < count; ++i) {
    Problem problem = random_problem(random, i);
    if (random() % 3 == 0) extend_problem(random, problem);
    check(problem);
  }
  std::printf("%d of %d problems wrong\n", wrong, total);
  return wrong != 0;
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--correctness" || mode == "--random") {
    return run_correctness(argc > 2 ? std::atoi(argv[2]) : 200, argc > 3 ? std::atoi(argv[3]) : 0,
                           /*hard=*/mode == "--correctness");
  }
  if (mode == "--bench" || (mode == "--plan" && argc >= 4)) {
    const std::vector<std::string> names(argv + 2, mode == "--plan" ? argv + 3 : argv + argc);
    for (const Problem& problem : bench_problems()) {
      if (!names.empty() && std::find(names.begin(), names.end(), problem.name) == names.end()) continue;
      std::vector<BackwardPlan> plans;
      if (mode == "--plan") {
        for (int i = 3; i < argc; ++i) plans.push_back(parse_backward_plan(argv[i]));
      } else if (const auto known = known_plans().find(problem.name); known != known_plans().end()) {
        plans.push_back(parse_backward_plan(known->second));
      }
      bench(problem, plans, mode == "--bench" ? 3 : 0);
    }
    return 0;
  }
  std::printf("usage: see the head of tests/gpu/sm90_backward_driver.cu\n");
  return 2;
}

}  // namespace
}  // namespace jax_natten::driver

int main(int argc, char** argv) { return jax_natten::driver::main(argc, argv); }
