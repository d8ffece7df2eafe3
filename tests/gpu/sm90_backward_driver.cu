// Proves and times the sm_90 backward on a GPU, without JAX. The reference are the direct kernels (cuda/naive) in
// float32.
//
//   sm90_backward_driver --correctness [N [SEED]]   the hard problems, then N random ones, under random plans
//   sm90_backward_driver --random [N [SEED]]        the random ones alone, e.g. under compute-sanitizer
//   sm90_backward_driver --bench [NAME..]           the benchmark table
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
#include "backward_plans.h"
#include "device_reference.cuh"
#include "problems.h"

namespace jax_natten::driver {
namespace {

using sm90::BackwardPlan;

template <typename T>
__global__ void widen(const T* from, float* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    to[i] = to_float(from[i]);
  }
}

// sums[0] += squares of differences, sums[1] += squares of the reference; *bad += values that are no numbers.
template <typename T>
__global__ void add_errors(const T* result, const float* reference, int64_t count, double* sums, int* bad) {
  double squares = 0, reference_squares = 0;
  int not_numbers = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const float x = to_float(result[i]), d = x - reference[i];
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

  explicit Arrays(const FusedShape& shape) {
    static_cast<FusedShape&>(params) = shape;
    rows = shape.batch * shape.neighborhood.positions() * shape.heads;
    counts[0] = rows * shape.dim;
    counts[1] = counts[2] = rows / shape.heads * shape.kv_heads * shape.dim;
    params.additional_keys = params.additional_values = params.bias = nullptr;
    params.d_additional_keys = params.d_additional_values = params.d_bias = nullptr;
    params.query = normal(counts[0], 1);
    params.key = normal(counts[1], 2);
    params.value = normal(counts[2], 3);
    params.d_out = normal(counts[0], 4);
    auto* d_lse = allocate<float>(rows);
    fill_normal<<<1024, 256>>>(d_lse, rows, 5);
    params.d_lse = d_lse;
    auto *out = allocate<uint16_t>(counts[0]), *lse = allocate<uint16_t>(2 * rows);
    params.out = out;
    params.lse = lse;
    FusedForwardParams forward = {};
    static_cast<FusedShape&>(forward) = shape;
    forward.query = params.query;
    forward.key = params.key;
    forward.value = params.value;
    forward.out = out;
    forward.lse = lse;
    CHECK_CUDA(naive::fused_forward(forward, nullptr));
    for (int i = 0; i < 3; ++i) gradients[i] = allocate<uint8_t>(2 * counts[i] + kGuard);
    params.d_query = gradients[0];
    params.d_key = gradients[1];
    params.d_value = gradients[2];
    params.workspace_size = sm90::backward_workspace(shape);
    params.workspace = allocate<float>(params.workspace_size);
    CHECK_CUDA(cudaDeviceSynchronize());
    clear();
  }
  ~Arrays() {
    for (void* p : allocations) cudaFree(p);
  }
  Arrays(const Arrays&) = delete;

  void clear() {
    for (int i = 0; i < 3; ++i) CHECK_CUDA(cudaMemset(gradients[i], kFill, 2 * counts[i] + kGuard));
    CHECK_CUDA(cudaMemset(params.workspace, 0xFF, 4 * params.workspace_size));
  }

  // Runs the plan twice; compares with the reference, the two runs with each other, and looks at the guard bytes.
  // Prints a verdict.
  bool check(const BackwardPlan& plan) {
    if (references[0] == nullptr) make_reference();
    auto* sums = allocate<double>(6);
    int* faults = allocate<int>(3);  // not numbers, guard bytes, differing words
    CHECK_CUDA(cudaMemset(sums, 0, 6 * sizeof(double)));
    CHECK_CUDA(cudaMemset(faults, 0, 3 * sizeof(int)));
    clear();
    CHECK_CUDA(sm90::launch_backward(params, plan, nullptr));
    uint8_t* first[3];
    for (int i = 0; i < 3; ++i) {
      first[i] = allocate<uint8_t>(2 * counts[i]);
      CHECK_CUDA(cudaMemcpy(first[i], gradients[i], 2 * counts[i], cudaMemcpyDeviceToDevice));
      with_type(params.dtype, [&](auto t) {
        using T = decltype(t);
        add_errors<<<1024, 256>>>((const T*)gradients[i], references[i], counts[i], sums + 2 * i, faults);
      });
      count_other_bytes<<<1, 256>>>(gradients[i] + 2 * counts[i], kGuard, kFill, faults + 1);
    }
    clear();
    CHECK_CUDA(sm90::launch_backward(params, plan, nullptr));
    for (int i = 0; i < 3; ++i) {
      count_different_words<<<256, 256>>>((uint32_t*)gradients[i], (uint32_t*)first[i], counts[i] / 2, faults + 2);
    }
    double s[6];
    int f[3];
    CHECK_CUDA(cudaMemcpy(s, sums, sizeof(s), cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(f, faults, sizeof(f), cudaMemcpyDeviceToHost));
    bool good = f[0] == 0 && f[1] == 0 && f[2] == 0;
    for (int i = 0; i < 3; ++i) {
      // Gradients that cancel out are not asked to be exact.
      const double error = std::sqrt(s[2 * i] / std::max(s[2 * i + 1], 1e-6 * double(counts[i])));
      good = good && error < (params.dtype == DType::kFloat16 ? 2e-3 : 1e-2);
      std::printf(" %s %.1e", i == 0 ? "dq" : i == 1 ? "dk" : "dv", error);
    }
    std::printf(" nan %d guard %d rerun %d %s", f[0], f[1], f[2], good ? "ok" : "WRONG");
    return good;
  }

  FusedBackwardParams params = {};
  int64_t rows, counts[3];  // elements of d_query, d_key, d_value

 private:
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
  void make_reference() {
    FusedBackwardParams wide = params;
    wide.dtype = DType::kFloat32;
    const auto widened = [&](const void* from, int64_t count) {
      auto* to = allocate<float>(count);
      with_type(params.dtype, [&](auto t) { widen<<<1024, 256>>>((const decltype(t)*)from, to, count); });
      return to;
    };
    wide.query = widened(params.query, counts[0]);
    wide.key = widened(params.key, counts[1]);
    wide.value = widened(params.value, counts[2]);
    wide.out = widened(params.out, counts[0]);
    wide.d_out = widened(params.d_out, counts[0]);
    for (int i = 0; i < 3; ++i) references[i] = allocate<float>(counts[i]);
    wide.d_query = references[0];
    wide.d_key = references[1];
    wide.d_value = references[2];
    wide.workspace_size = fused_backward_workspace(wide);
    wide.workspace = allocate<float>(wide.workspace_size);
    CHECK_CUDA(naive::fused_backward(wide, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  std::vector<void*> allocations;
  uint8_t* gradients[3] = {};
  float* references[3] = {};
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

// Times plans in turns, so that clocks and temperature treat them alike, and prints the medians of the rounds.
void bench(const Problem& problem, std::vector<BackwardPlan> plans) {
  Arrays arrays(problem.shape);
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  const auto milliseconds = [&](Walk pass, const BackwardPlan& plan, int launches) {
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i) CHECK_CUDA(sm90::launch_backward_pass(pass, arrays.params, plan, nullptr));
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaDeviceSynchronize());
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms / launches;
  };
  const auto refused = [&](const BackwardPlan& plan) {
    const char* reason = sm90::why_not(arrays.params, plan);
    if (reason != nullptr) std::printf("%-20s %s: %s\n", problem.name.c_str(), to_string(plan).c_str(), reason);
    return reason != nullptr;
  };
  plans.erase(std::remove_if(plans.begin(), plans.end(), refused), plans.end());
  constexpr int kRounds = 7;
  std::vector<std::vector<float>> times[2];
  for (auto& of_pass : times) of_pass.resize(plans.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < plans.size(); ++i) {
      for (const Walk pass : {sm90::kQueryPass, sm90::kKeyPass}) {
        std::vector<float>& t = times[pass == sm90::kKeyPass][i];
        const float one = round == 0 ? milliseconds(pass, plans[i], 2) : t[0];
        t.push_back(milliseconds(pass, plans[i], std::max(2, std::min(50, int(15 / one)))));
      }
    }
  }
  const double flops = useful_flops(problem.shape);
  for (size_t i = 0; i < plans.size(); ++i) {
    float median[2];
    for (int pass = 0; pass < 2; ++pass) {
      std::sort(times[pass][i].begin(), times[pass][i].end());
      median[pass] = times[pass][i][kRounds / 2];
    }
    std::printf("%-20s %-64s query %8.4f ms key %8.4f ms sum %8.4f ms %6.1f TFLOP/s", problem.name.c_str(),
                to_string(plans[i]).c_str(), median[0], median[1], median[0] + median[1],
                flops / (median[0] + median[1]) * 1e-9);
    arrays.check(plans[i]);
    std::printf("\n");
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
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
  for (int i = 0; i < count; ++i) check(random_problem(random, i));
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
      if (!plans.empty()) bench(problem, plans);
    }
    return 0;
  }
  std::printf("usage: see the head of tests/gpu/sm90_backward_driver.cu\n");
  return 2;
}

}  // namespace
}  // namespace jax_natten::driver

int main(int argc, char** argv) { return jax_natten::driver::main(argc, argv); }
