// Proves and times the sm_90 forward kernels on a GPU, without JAX.
//
//   sm90_driver --probe                    hardware behaviour that the kernels rely on
//   sm90_driver --correctness [N [SEED [heads]]]   the hard problems, then N random ones, with random tile shapes
//   sm90_driver --bench [NAME..]           the benchmark table
//   sm90_driver --plan NAME q0,q1,q2 p0,p1,p2 k0,k1,k2 [late] [heads] [check]     one problem under one plan
// "heads" uses the tensor maps that fold heads into channels, where they apply.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "device_reference.cuh"
#include "problems.h"
#include "tma_probe.cuh"

namespace jax_natten::driver {
namespace {

using sm90::TensorMapLayout;
using sm90::WidePlan;

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
    params.additional_keys = params.additional_values = params.bias = nullptr;
    with_type(shape.dtype, [&](auto t) {
      using T = decltype(t);
      fill_normal<<<1024, 256>>>((T*)params.query, query_count, 1);
      fill_normal<<<1024, 256>>>((T*)params.key, key_count, 2);
      fill_normal<<<1024, 256>>>((T*)params.value, key_count, 3);
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

template <typename Launch>
void time_launch(Launch launch, float& best, float& mean) {
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  const auto milliseconds = [&](int launches) {
    CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i) launch();
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaDeviceSynchronize());
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms / launches;
  };
  best = 1e9;
  for (int i = 0; i < 5; ++i) best = std::min(best, milliseconds(1));
  const int launches = std::max(3, std::min(50, int(30 / best)));
  mean = milliseconds(launches);
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
}

std::string to_string(const WidePlan& plan) {
  char text[128];
  std::snprintf(text, sizeof(text), "q%d.%d.%d p%d.%d.%d k%d.%d.%d %s%s", plan.query_tile[0], plan.query_tile[1],
                plan.query_tile[2], plan.query_part[0], plan.query_part[1], plan.query_part[2], plan.key_tile[0],
                plan.key_tile[1], plan.key_tile[2], plan.early_exponentials ? "early" : "late",
                plan.layout == TensorMapLayout::kSlabs ? "" : " heads");
  return text;
}

void launch(const Arrays& arrays, const WidePlan& plan) { CHECK_CUDA(sm90::launch_wide(arrays.params, plan, nullptr)); }

void bench(Arrays& arrays, const std::string& name, const WidePlan& plan, bool check) {
  if (const char* reason = sm90::why_not_wide_plan(arrays.params, plan)) {
    std::printf("%-20s %s: %s\n", name.c_str(), to_string(plan).c_str(), reason);
    return;
  }
  arrays.clear();
  float best, mean;
  time_launch([&] { launch(arrays, plan); }, best, mean);
  const double flops = useful_flops(arrays.params);
  std::printf("%-20s %-44s best %8.4f ms %6.1f TFLOP/s  mean %8.4f ms %6.1f", name.c_str(), to_string(plan).c_str(),
              best, flops / best * 1e-9, mean, flops / mean * 1e-9);
  if (check) arrays.check([&] { launch(arrays, plan); });
  std::printf("\n");
}

WidePlan plan_of(std::vector<int> q, std::vector<int> part, std::vector<int> k) {
  WidePlan plan;
  std::copy(q.begin(), q.end(), plan.query_tile);
  std::copy(part.begin(), part.end(), plan.query_part);
  std::copy(k.begin(), k.end(), plan.key_tile);
  return plan;
}

// The plans that the prototype was measured with.
const std::map<std::string, WidePlan>& known_plans() {
  static const std::map<std::string, WidePlan> plans = {
      {"flux_s1", plan_of({1, 16, 8}, {1, 8, 8}, {1, 16, 8})},
      {"flux_s16", plan_of({1, 16, 8}, {1, 8, 8}, {1, 16, 8})},
      {"hunyuan_s1", plan_of({2, 8, 8}, {2, 4, 8}, {2, 8, 8})},
      {"hunyuan_s16_8_8", plan_of({2, 8, 8}, {1, 8, 8}, {2, 8, 8})},
      {"cosmos_s1", plan_of({16, 4, 2}, {16, 4, 1}, {16, 4, 2})},
      {"cosmos_s1_8_16", plan_of({2, 4, 16}, {1, 4, 16}, {1, 8, 16})},
      {"cosmos_w16_32_48", plan_of({16, 2, 4}, {16, 1, 4}, {16, 2, 4})},
      {"cosmos2_s1_4_8", plan_of({4, 4, 8}, {2, 4, 8}, {4, 4, 8})},
      {"seq32k_w2048", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"seq32k_w2048_s256", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"seq32k_w2048_causal", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"seq32k_gqa8", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"dense16k_d128", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"dense16k_d64", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"nat_56", plan_of({1, 8, 16}, {1, 8, 8}, {1, 9, 14})},
      {"dinat_56_d8", plan_of({1, 8, 16}, {1, 8, 8}, {1, 16, 8})},
      {"hdit_64_k13", plan_of({1, 8, 16}, {1, 8, 8}, {1, 6, 20})},
      {"hdit_64_k13_d4", plan_of({1, 8, 16}, {1, 8, 8}, {1, 16, 8})},
      {"seq4k_w127", plan_of({1, 1, 128}, {1, 1, 64}, {1, 1, 128})},
      {"weather", plan_of({4, 4, 8}, {4, 2, 8}, {1, 8, 16})},
      {"vae_k3_7_7", plan_of({4, 4, 8}, {4, 2, 8}, {1, 8, 16})},
  };
  return plans;
}

void run_bench(const std::vector<std::string>& names) {
  for (const Problem& problem : bench_problems()) {
    if (!names.empty() && std::find(names.begin(), names.end(), problem.name) == names.end()) continue;
    const auto known = known_plans().find(problem.name);
    if (known == known_plans().end()) continue;
    Arrays arrays(problem.shape);
    for (const bool early : {true, false}) {
      WidePlan plan = known->second;
      plan.early_exponentials = early;
      bench(arrays, problem.name, plan, early);
      plan.layout = TensorMapLayout::kHeadsInChannels;
      if (early) bench(arrays, problem.name, plan, false);
    }
  }
}

// ---- random plans and problems

// A random factorisation into tiles of at most `most` in all; axes that do not exist get 1.
std::vector<int> random_tile(std::mt19937& random, int rank, int most) {
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

WidePlan random_plan(std::mt19937& random, const FusedShape& shape) {
  const int rank = shape.neighborhood.rank;
  const int keys = sm90::wide_compiled_dim(shape.dim) <= 128   ? 128
                   : sm90::wide_compiled_dim(shape.dim) == 192 ? 96
                                                               : 64;
  const std::vector<int> part = random_tile(random, rank, 64), key = random_tile(random, rank, keys);
  std::vector<int> query = part;
  query[3 - 1 - random() % rank] *= 2;
  WidePlan plan = plan_of(query, part, key);
  plan.early_exponentials = random() % 4 != 0;
  return plan;
}

Problem random_problem(std::mt19937& random, int index) {
  const int rank = 1 + random() % 3;
  const int sizes[] = {600, 48, 20};
  std::vector<int> x, k, s, d;
  unsigned causal = 0;
  for (int a = 0; a < rank; ++a) {
    const int dilation = random() % 3 == 0 ? 1 + random() % 5 : 1;
    x.push_back(dilation + random() % sizes[rank - 1]);
    const int most = x.back() / dilation;
    k.push_back(random() % 5 == 0 ? most : 1 + random() % most);
    s.push_back(random() % 2 == 0 ? 1 : 1 + random() % k.back());
    d.push_back(dilation);
    causal |= unsigned(random() % 4 == 0) << a;
  }
  const int dims[] = {32, 64, 64, 128, 128, 96, 192, 256, 40, 24, 88, 120, 8, 200};
  const int kv_heads = 1 + random() % 3;
  Problem problem = make_problem("random" + std::to_string(index), random() % 2 ? DType::kBFloat16 : DType::kFloat16,
                                 1 + random() % 2, kv_heads * (random() % 3 ? 1 : 1 + random() % 4), kv_heads,
                                 dims[random() % 14], x, k, s, d, causal);
  const double factors[] = {1, 1, 1, 4, -1, 0, -3};
  problem.shape.scale *= factors[random() % 7];
  return problem;
}

std::string describe(const FusedShape& shape) {
  std::string text = "B" + std::to_string(shape.batch) + " H" + std::to_string(shape.heads) + "/" +
                     std::to_string(shape.kv_heads) + " D" + std::to_string(shape.dim) +
                     (shape.dtype == DType::kFloat16 ? " f16" : " bf16");
  for (int a = kMaxRank - shape.neighborhood.rank; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    text += " [x" + std::to_string(axis.length) + " k" + std::to_string(axis.window) + " s" +
            std::to_string(axis.stride) + " d" + std::to_string(axis.dilation) + (axis.causal ? " causal]" : "]");
  }
  return text + " scale " + std::to_string(shape.scale);
}

bool check_problem(const Problem& problem, const WidePlan& plan) {
  if (const char* reason = sm90::why_not_wide_plan(problem.shape, plan)) {
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

int run_correctness(int count, unsigned seed, TensorMapLayout layout) {
  std::mt19937 random(seed);
  int wrong = 0, total = 0;
  const auto check = [&](const Problem& problem) {
    WidePlan plan = random_plan(random, problem.shape);
    plan.layout = layout;
    wrong += !check_problem(problem, plan);
    ++total;
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (unsigned causal = 0; causal < 8; ++causal) {
      for (const Problem& problem : hard_problems(dtype, causal)) {
        check(problem);
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    check(random_problem(random, i));
  }
  std::printf("%d of %d problems wrong\n", wrong, total);
  return wrong != 0;
}

std::vector<int> parse_three(const char* text) {
  std::vector<int> v(3, 1);
  if (std::sscanf(text, "%d,%d,%d", &v[0], &v[1], &v[2]) != 3) std::exit(2);
  return v;
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, compute capability %d.%d, %d multiprocessors\n", properties.name, properties.major, properties.minor,
              properties.multiProcessorCount);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--probe") return run_probe();
  if (mode == "--correctness") {
    return run_correctness(argc > 2 ? std::atoi(argv[2]) : 200, argc > 3 ? std::atoi(argv[3]) : 0,
                           argc > 4 ? TensorMapLayout::kHeadsInChannels : TensorMapLayout::kSlabs);
  }
  if (mode == "--bench") {
    run_bench({argv + 2, argv + argc});
    return 0;
  }
  if (mode == "--plan" && argc >= 6) {
    for (const Problem& problem : bench_problems()) {
      if (problem.name != argv[2]) continue;
      Arrays arrays(problem.shape);
      WidePlan plan = plan_of(parse_three(argv[3]), parse_three(argv[4]), parse_three(argv[5]));
      bool check = false;
      for (int i = 6; i < argc; ++i) {
        if (!std::strcmp(argv[i], "late")) plan.early_exponentials = false;
        if (!std::strcmp(argv[i], "heads")) plan.layout = TensorMapLayout::kHeadsInChannels;
        if (!std::strcmp(argv[i], "check")) check = true;
      }
      bench(arrays, problem.name, plan, check);
    }
    return 0;
  }
  std::printf("usage: see the head of tests/gpu/sm90_driver.cu\n");
  return 2;
}

}  // namespace
}  // namespace jax_natten::driver

int main(int argc, char** argv) { return jax_natten::driver::main(argc, argv); }
