// Proves and times the sm_90 forward kernels on a GPU, without JAX.
//
//   sm90_driver --probe                    hardware behaviour that the kernels rely on
//   sm90_driver --correctness [N [SEED]]   the hard problems, then N random ones, with random tile shapes
//   sm90_driver --random [N [SEED]]        the random ones alone, e.g. under compute-sanitizer
//   sm90_driver --bench [NAME..]           the benchmark table: known plans, and beside them the chooser's first three
//   sm90_driver --fit N [NAME..]           the N best plans of each structure, with what the cost model is fitted to
//   sm90_driver --plan NAME PLAN..         one problem under some plans, their timings interleaved
// PLAN: see plans.h
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/sm90/choose.h"
#include "../../cuda/sm90/forward.h"
#include "device_reference.cuh"
#include "plans.h"
#include "problems.h"
#include "tma_probe.cuh"

namespace jax_natten::driver {
namespace {

template <typename Function>
void with_type(DType dtype, Function function) {
  if (dtype == DType::kFloat16) {
    function(__half());
  } else {
    function(__nv_bfloat16());
  }
}

// A problem's arrays on the GPU. Output arrays are followed by guard bytes.
class Arrays {
 public:
  static constexpr int64_t kGuard = 4096;
  static constexpr uint8_t kFill = 0xA5;

  explicit Arrays(const FusedShape& shape) {
    static_cast<FusedShape&>(params) = shape;
    rows = shape.batch * shape.neighborhood.positions() * shape.heads;
    query_count = rows * shape.dim;
    const int64_t key_count = rows / shape.heads * shape.kv_heads * shape.dim;
    params.query = allocate(2 * query_count);
    params.key = allocate(2 * key_count);
    params.value = allocate(2 * key_count);
    params.out = allocate(2 * query_count + kGuard);
    params.lse = allocate(4 * rows + kGuard);
    const int64_t additional = shape.batch * shape.additional * shape.kv_heads * shape.dim;
    const int64_t entries = shape.bias_batch * shape.heads * shape.neighborhood.bias_size();
    params.additional_keys = allocate(2 * additional);
    params.additional_values = allocate(2 * additional);
    params.bias = allocate(4 * entries);
    fill_normal<<<1024, 256>>>((float*)params.bias, entries, 6);
    with_type(shape.dtype, [&](auto t) {
      using T = decltype(t);
      fill_normal<<<1024, 256>>>((T*)params.query, query_count, 1);
      fill_normal<<<1024, 256>>>((T*)params.key, key_count, 2);
      fill_normal<<<1024, 256>>>((T*)params.value, key_count, 3);
      fill_normal<<<1024, 256>>>((T*)params.additional_keys, additional, 4);
      fill_normal<<<1024, 256>>>((T*)params.additional_values, additional, 5);
    });
    CHECK_CUDA(cudaDeviceSynchronize());
    clear();
  }
  ~Arrays() {
    for (void* p : allocations) cudaFree(p);
  }
  Arrays(const Arrays&) = delete;

  void clear() {
    CHECK_CUDA(cudaMemset(params.out, kFill, 2 * query_count + kGuard));
    CHECK_CUDA(cudaMemset(params.lse, kFill, 4 * rows + kGuard));
  }

  // Compares with the reference; also guard bytes, and the bits of a second run. Prints a verdict.
  template <typename Launch>
  bool check(Launch launch) {
    if (reference_out == nullptr) make_reference();
    auto* difference = static_cast<Difference*>(allocate(sizeof(Difference)));
    int* counts = static_cast<int*>(allocate(2 * sizeof(int)));
    CHECK_CUDA(cudaMemset(difference, 0, sizeof(Difference)));
    CHECK_CUDA(cudaMemset(counts, 0, 2 * sizeof(int)));
    auto* first_out = static_cast<uint8_t*>(allocate(2 * query_count + kGuard));
    CHECK_CUDA(cudaMemcpy(first_out, params.out, 2 * query_count, cudaMemcpyDeviceToDevice));
    with_type(params.dtype, [&](auto t) {
      using T = decltype(t);
      compare<<<256, 256>>>((const T*)params.out, reference_out, (const float*)params.lse, reference_lse, samples, step,
                            params.dim, difference);
    });
    count_other_bytes<<<1, 256>>>((uint8_t*)params.out + 2 * query_count, kGuard, kFill, counts);
    count_other_bytes<<<1, 256>>>((uint8_t*)params.lse + 4 * rows, kGuard, kFill, counts);
    clear();
    launch();
    count_different_words<<<256, 256>>>((uint32_t*)params.out, (uint32_t*)first_out, query_count / 2, counts + 1);
    Difference d;
    int host_counts[2];
    CHECK_CUDA(cudaMemcpy(&d, difference, sizeof(d), cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(host_counts, counts, sizeof(host_counts), cudaMemcpyDeviceToHost));
    const double error = std::sqrt(d.squares / d.reference_squares);
    const bool good = d.bad == 0 && error < (params.dtype == DType::kFloat16 ? 1e-3 : 6e-3) && d.lse < 1e-3 &&
                      host_counts[0] == 0 && host_counts[1] == 0;
    std::printf(" error %.1e lse %.1e nan %d guard %d rerun %d %s", error, d.lse, d.bad, host_counts[0], host_counts[1],
                good ? "ok" : "WRONG");
    return good;
  }

  FusedForwardParams params;
  int64_t rows, query_count;

 private:
  void* allocate(int64_t bytes) {
    void* p;
    CHECK_CUDA(cudaMalloc(&p, std::max<int64_t>(bytes, 16)));
    allocations.push_back(p);
    return p;
  }
  // Of all pairs of a small problem, of about 20,000 of a large one.
  void make_reference() {
    step = rows <= 40000 ? 1 : rows / 20000 | 1;
    samples = (rows + step - 1) / step;
    reference_out = static_cast<float*>(allocate(4 * samples * params.dim));
    reference_lse = static_cast<float*>(allocate(4 * samples));
    with_type(params.dtype, [&](auto t) {
      const unsigned blocks = unsigned((samples * 32 + 255) / 256);
      reference_forward<decltype(t)><<<blocks, 256>>>(params, step, reference_out, reference_lse);
    });
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  int64_t step = 1, samples = 0;
  std::vector<void*> allocations;
  float *reference_out = nullptr, *reference_lse = nullptr;
};

double useful_flops(const FusedShape& shape) {
  double pairs = 1;
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
  return 4 * pairs * shape.batch * shape.heads * shape.dim;
}

void launch(const Arrays& arrays, const Plan& plan) { CHECK_CUDA(sm90::launch(arrays.params, plan, nullptr)); }

// Milliseconds of each plan: those of several rounds, ascending. Plans are timed in turns, so that clocks and
// temperature treat them alike.
std::vector<std::vector<float>> time_plans(const Arrays& arrays, const std::vector<Plan>& plans) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  const auto milliseconds = [&](const Plan& plan, int launches) {
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i) launch(arrays, plan);
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaDeviceSynchronize());
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms / launches;
  };
  constexpr int kRounds = 7;
  std::vector<std::vector<float>> times(plans.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < plans.size(); ++i) {
      const float one = round == 0 ? milliseconds(plans[i], 2) : times[i][0];
      times[i].push_back(milliseconds(plans[i], std::max(2, std::min(50, int(15 / one)))));
    }
  }
  for (std::vector<float>& of_plan : times) std::sort(of_plan.begin(), of_plan.end());
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  return times;
}

// Prints the times of plans, and whether they compute what they should.
void bench(Arrays& arrays, const std::string& name, std::vector<Plan> plans) {
  const auto refused = [&](const Plan& plan) {
    const char* reason = sm90::why_not(arrays.params, plan);
    if (reason != nullptr) std::printf("%-20s %s: %s\n", name.c_str(), to_string(plan).c_str(), reason);
    return reason != nullptr;
  };
  plans.erase(std::remove_if(plans.begin(), plans.end(), refused), plans.end());
  const std::vector<std::vector<float>> times = time_plans(arrays, plans);
  const double flops = useful_flops(arrays.params);
  for (size_t i = 0; i < plans.size(); ++i) {
    const float best = times[i][0], median = times[i][times[i].size() / 2];
    std::printf("%-20s %-44s median %8.4f ms %6.1f TFLOP/s  best %8.4f ms %6.1f", name.c_str(),
                to_string(plans[i]).c_str(), median, flops / median * 1e-9, best, flops / best * 1e-9);
    arrays.clear();
    launch(arrays, plans[i]);
    arrays.check([&] { launch(arrays, plans[i]); });
    std::printf("\n");
  }
}

// Plans of the benchmark problems, found by measurement.
const std::map<std::string, const char*>& known_plans() {
  static const std::map<std::string, const char*> plans = {
      {"flux_s1", "wide:1,16,8:1,8,8:1,16,8"},
      {"flux_s16", "wide:1,16,8:1,8,8:1,16,8"},
      {"hunyuan_s1", "wide:2,8,8:2,4,8:2,8,8"},
      {"hunyuan_s16_8_8", "wide:2,8,8:1,8,8:2,8,8"},
      {"cosmos_s1", "wide:16,4,2:16,4,1:16,4,2"},
      {"cosmos_s1_8_16", "wide:2,4,16:1,4,16:1,8,16"},
      {"cosmos_w16_32_48", "wide:16,2,4:16,1,4:16,2,4"},
      {"cosmos2_s1_4_8", "wide:4,4,8:2,4,8:4,4,8"},
      {"seq32k_w2048", "wide:1,1,128:1,1,64:1,1,128"},
      {"seq32k_w2048_s256", "wide:1,1,128:1,1,64:1,1,128"},
      {"seq32k_w2048_causal", "wide:1,1,128:1,1,64:1,1,128"},
      {"seq32k_gqa8", "wide:1,1,128:1,1,64:1,1,128"},
      {"dense16k_d128", "wide:1,1,128:1,1,64:1,1,128"},
      {"dense16k_d64", "wide:1,1,128:1,1,64:1,1,128"},
      {"nat_56", "warp:1,56,4:1,4,4:1,56,10:1,2,2"},
      {"nat_28", "warp:1,28,4:1,4,4:1,28,10:1,2,2"},
      {"nat_14", "warp:1,7,14:1,7,2:1,10,14:1,2,2"},
      {"nat_7", "warp:1,8,7:1,2,7:1,7,7:2,2,2"},
      {"dinat_56_d8", "warp:1,8,7:1,2,7:1,7,7:2,2,2"},
      {"dinat_28_d4", "warp:1,8,7:1,2,7:1,7,7:2,2,2"},
      {"hdit_64_k13", "middle:1,8,8:1,8,8:1,4,20"},
      {"hdit_64_k13_d4", "middle:1,8,8:1,8,8:1,7,14"},
      {"seq4k_w127", "middle:1,1,64:1,1,64:1,1,95"},
      {"weather", "warp:2,10,12:2,2,4:1,16,18:1,2,4"},
      {"vae_k3_7_7", "warp:2,4,20:2,2,4:1,10,26:1,2,2"},
  };
  return plans;
}

void run_bench(const std::vector<std::string>& names) {
  for (const Problem& problem : bench_problems()) {
    if (!names.empty() && std::find(names.begin(), names.end(), problem.name) == names.end()) continue;
    const auto known = known_plans().find(problem.name);
    if (known == known_plans().end()) continue;
    Arrays arrays(problem.shape);
    std::vector<Plan> plans = {parse_plan(known->second)};
    for (const sm90::Candidate& chosen : sm90::rank_plans(problem.shape, sm90::kProcessors, 3)) {
      if (to_string(chosen.plan) != to_string(plans[0])) plans.push_back(chosen.plan);
    }
    bench(arrays, problem.name, plans);
  }
}

// Times the best plans of each structure, and prints with their times what the cost model (cost.cc) counts.
void run_fit(int count, const std::vector<std::string>& names) {
  for (const Problem& problem : bench_problems()) {
    if (!names.empty() && std::find(names.begin(), names.end(), problem.name) == names.end()) continue;
    Arrays arrays(problem.shape);
    int left[3] = {count, count, count};
    std::vector<Plan> plans;
    for (const sm90::Candidate& candidate : sm90::rank_plans(problem.shape, sm90::kProcessors, 600)) {
      if (left[int(candidate.plan.structure)]-- > 0) plans.push_back(candidate.plan);
    }
    const std::vector<std::vector<float>> times = time_plans(arrays, plans);
    for (size_t i = 0; i < plans.size(); ++i) {
      const sm90::Prediction p = sm90::predict(problem.shape, plans[i], sm90::kProcessors);
      std::printf("fit,%s,%d,%s,%.5f,%.5f,%.0f,%.0f,%.0f,%.0f,%.0f\n", problem.name.c_str(), problem.shape.dim,
                  to_string(plans[i]).c_str(), times[i][times[i].size() / 2], 1e3 * p.seconds, p.tiles.query_tiles,
                  p.tiles.parts, p.tiles.visited, p.tiles.computed, p.tiles.masked);
    }
  }
}

bool check_problem(const Problem& problem, const Plan& plan) {
  if (const char* reason = sm90::why_not(problem.shape, plan)) {
    std::printf("%-18s refused: %s\n", problem.name.c_str(), reason);
    return true;
  }
  Arrays arrays(problem.shape);
  std::printf("%-18s", problem.name.c_str());
  std::fflush(stdout);
  launch(arrays, plan);
  const cudaError_t error = cudaDeviceSynchronize();
  bool good = false;
  if (error != cudaSuccess) {
    std::printf(" FAILED: %s", cudaGetErrorString(error));
  } else {
    good = arrays.check([&] { launch(arrays, plan); });
  }
  std::printf("  %s | %s\n", describe(problem.shape).c_str(), to_string(plan).c_str());
  if (error != cudaSuccess) std::exit(1);
  return good;
}

int run_correctness(int count, unsigned seed, bool hard) {
  std::mt19937 random(seed);
  int wrong = 0, total = 0;
  const auto check = [&](const Problem& problem) {
    wrong += !check_problem(problem, random_plan(random, problem.shape));
    ++total;
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (unsigned causal = 0; hard && causal < 8; ++causal) {
      for (const Problem& problem : hard_problems(dtype, causal)) {
        check(problem);
      }
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
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, compute capability %d.%d, %d multiprocessors\n", properties.name, properties.major, properties.minor,
              properties.multiProcessorCount);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--probe") return run_probe();
  if (mode == "--correctness" || mode == "--random") {
    return run_correctness(argc > 2 ? std::atoi(argv[2]) : 200, argc > 3 ? std::atoi(argv[3]) : 0,
                           /*hard=*/mode == "--correctness");
  }
  if (mode == "--bench") {
    run_bench({argv + 2, argv + argc});
    return 0;
  }
  if (mode == "--fit" && argc >= 3) {
    run_fit(std::atoi(argv[2]), {argv + 3, argv + argc});
    return 0;
  }
  if (mode == "--plan" && argc >= 4) {
    for (const Problem& problem : bench_problems()) {
      if (problem.name != argv[2]) continue;
      Arrays arrays(problem.shape);
      std::vector<Plan> plans;
      for (int i = 3; i < argc; ++i) plans.push_back(parse_plan(argv[i]));
      bench(arrays, problem.name, plans);
    }
    return 0;
  }
  std::printf("usage: see the head of tests/gpu/sm90_driver.cu\n");
  return 2;
}

}  // namespace
}  // namespace jax_natten::driver

int main(int argc, char** argv) { return jax_natten::driver::main(argc, argv); }
