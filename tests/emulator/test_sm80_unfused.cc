// The unfused sm_80 kernels against the definition, on the CPU.
//
//   test_sm80_unfused [N [SEED]]     N random problems (default 40, 0): all three operations, each under the plan that
//   is
//                                    chosen for it or a random one
//   test_sm80_unfused --hard [MOST]  the hard windows with at most MOST (default 2e8) multiplications, all causal axes
//   test_sm80_unfused --plans        the chosen plans of the benchmark's problems
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>

#include "../gpu/problems.h"
#include "cuda/common/workspace.h"
#include "cuda/sm80/unfused.h"
#include "emulator.h"
#include "reference.h"

namespace jax_natten::testing {
namespace {

using sm80::Operation;
using sm80::Precision;
using sm80::UnfusedPlan;

constexpr const char* kNames[] = {"PN", "NN", "IN"};

struct Problem {
  std::string name;
  UnfusedShape shape;
  Precision precision = Precision::kSplitTf32;
};

// ---- the definition

struct Arrays {
  const void *weights, *queries, *keys, *additional_keys, *bias;
};

// Calls function(row of weights, slot, row of keys, row of additional keys or -1, bias entry) for every pair.
template <typename Function>
void for_each_pair(const UnfusedShape& p, Function function) {
  const int64_t positions = p.neighborhood.positions();
  const Axis* axes = p.neighborhood.axes;
  for (int64_t row = 0; row < p.batch * positions * p.heads; ++row) {
    const int head = int(row % p.heads), kv_head = head / p.group();
    const int64_t batch = row / p.heads / positions, position = row / p.heads % positions;
    int64_t rest = position;
    int x[kMaxRank];
    for (int a = kMaxRank - 1; a >= 0; --a) {
      x[a] = int(rest % axes[a].length);
      rest /= axes[a].length;
    }
    for_each_neighbor(p.neighborhood, position, [&](int64_t key, int64_t bias) {
      int64_t rest = key, slot = 0;
      int y[kMaxRank];
      for (int a = kMaxRank - 1; a >= 0; --a) {
        y[a] = int(rest % axes[a].length);
        rest /= axes[a].length;
      }
      for (int a = 0; a < kMaxRank; ++a) {
        const Axis& axis = axes[a];
        const int length = group_length(axis, x[a] % axis.dilation);
        slot = slot * axis.window + y[a] / axis.dilation - window_of_query(axis, x[a] / axis.dilation, length).begin;
      }
      const int64_t table = p.has_bias() ? batch / (p.batch / p.bias_batch) * p.heads + head : 0;
      function(row, slot, (batch * positions + key) * p.kv_heads + kv_head, int64_t(-1),
               table * p.neighborhood.bias_size() + bias);
    });
    for (int s = 0; s < p.additional; ++s) {
      function(row, p.neighborhood.window_size() + s, int64_t(-1), (batch * p.additional + s) * p.kv_heads + kv_head,
               int64_t(-1));
    }
  }
}

std::vector<double> to_doubles(DType dtype, const void* data, int64_t count) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = to_double(dtype, data, i);
  return values;
}

// ---- one problem

struct Counts {
  int64_t rows, key_rows, additional_rows, weights, bias;

  explicit Counts(const UnfusedShape& s)
      : rows(s.batch * s.neighborhood.positions() * s.heads),
        key_rows(s.batch * s.neighborhood.positions() * s.kv_heads),
        additional_rows(s.batch * s.additional * s.kv_heads),
        weights(rows * s.slots()),
        bias(s.bias_batch * s.heads * s.neighborhood.bias_size()) {}
};

// An array that begins `offset` elements behind a 16-byte boundary.
class Array {
 public:
  Array(DType dtype, int64_t count, int offset, uint8_t fill = 0xFF)
      : dtype_(dtype), count_(count), offset_(offset), memory_((count + offset) * element_bytes(dtype), fill) {}

  void* data() const { return memory_.as<uint8_t>() + offset_ * element_bytes(dtype_); }
  bool intact() const { return memory_.intact(); }
  std::vector<double> values() const { return to_doubles(dtype_, data(), count_); }
  double error(const std::vector<double>& reference) const { return relative_error(reference, dtype_, data()); }
  void fill_normal(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count_; ++i) from_double(dtype_, normal(random), data(), i);
  }
  std::string bytes() const {
    return std::string(static_cast<const char*>(data()), size_t(count_ * element_bytes(dtype_)));
  }

 private:
  DType dtype_;
  int64_t count_;
  int offset_;
  emulator::Memory memory_;
};

double tolerance(const Problem& problem) {
  switch (problem.shape.dtype) {
    case DType::kFloat16:
      return 1e-3;
    case DType::kBFloat16:
      return 6e-3;
    default:
      return problem.precision == Precision::kTf32 ? 2e-3 : 3e-6;
  }
}

// Runs a problem, and some problems again: the results must have the same bits, whatever the order of threads.
template <typename Launch>
bool run_twice(Launch launch, std::initializer_list<const Array*> results, std::mt19937& random, cudaError_t& error) {
  emulator::Settings settings;
  settings.seed = random();
  settings.capability[0] = 8;
  emulator::configure(settings);
  error = launch();
  if (error != cudaSuccess || random() % 8 != 0) return error == cudaSuccess;
  std::vector<std::string> first;
  for (const Array* result : results) first.push_back(result->bytes());
  ++settings.seed;
  emulator::configure(settings);
  error = launch();
  size_t i = 0;
  for (const Array* result : results) {
    if (result->bytes() != first[i++]) std::printf(" OTHER BITS"), error = cudaErrorInvalidValue;
  }
  return error == cudaSuccess;
}

double check_pn(const Problem& problem, const UnfusedPlan* plan, std::mt19937& random, cudaError_t& error) {
  const UnfusedShape& s = problem.shape;
  const Counts n(s);
  const int offset = random() % 8 == 0 ? 1 : 0;
  Array queries(s.dtype, n.rows * s.dim, offset), keys(s.dtype, n.key_rows * s.dim, offset),
      additional(s.dtype, n.additional_rows * s.dim, offset), bias(DType::kFloat32, n.bias, 0),
      weights(s.dtype, n.weights, int(random() % 8));
  for (Array* a : {&queries, &keys, &additional, &bias}) a->fill_normal(random);
  PnParams params = {};
  static_cast<UnfusedShape&>(params) = s;
  params.queries = queries.data();
  params.keys = keys.data();
  params.additional_keys = s.additional > 0 ? additional.data() : nullptr;
  params.bias = s.has_bias() ? bias.data() : nullptr;
  params.weights = weights.data();
  if (!run_twice([&] { return sm80::pn(params, nullptr, problem.precision, plan); }, {&weights}, random, error)) {
    return INFINITY;
  }
  const std::vector<double> q = queries.values(), k = keys.values(), ak = additional.values(), b = bias.values();
  const double fill = s.fill_negative_infinity ? -INFINITY : 0;
  std::vector<double> reference(n.weights, fill);
  for_each_pair(s, [&](int64_t row, int64_t slot, int64_t key, int64_t additional_key, int64_t entry) {
    const double* other = additional_key < 0 ? &k[key * s.dim] : &ak[additional_key * s.dim];
    double sum = s.has_bias() && entry >= 0 ? b[entry] : 0;
    for (int c = 0; c < s.dim; ++c) sum += q[row * s.dim + c] * other[c];
    reference[row * s.slots() + slot] = sum;
  });
  // What is filled must be exactly so; compare the rest.
  const std::vector<double> got = weights.values();
  double squares = 0, all = 0;
  for (int64_t i = 0; i < n.weights; ++i) {
    if (reference[i] == fill) {
      if (got[i] != fill) return INFINITY;
      continue;
    }
    squares += (got[i] - reference[i]) * (got[i] - reference[i]);
    all += reference[i] * reference[i];
  }
  const double result = std::sqrt(squares / all);
  return weights.intact() && result < INFINITY ? result : INFINITY;
}

// Weights in slots past a causal query, which must not count.
void poison_unseen(const UnfusedShape& s, Array& weights, std::mt19937& random) {
  std::vector<bool> seen(Counts(s).weights);
  for_each_pair(s, [&](int64_t row, int64_t slot, int64_t, int64_t, int64_t) { seen[row * s.slots() + slot] = true; });
  for (size_t i = 0; i < seen.size(); ++i) {
    if (!seen[i]) from_double(s.dtype, random() % 2 ? -INFINITY : std::nan(""), weights.data(), int64_t(i));
  }
}

double check_nn(const Problem& problem, const UnfusedPlan* plan, std::mt19937& random, cudaError_t& error) {
  const UnfusedShape& s = problem.shape;
  const Counts n(s);
  const int offset = random() % 8 == 0 ? 1 : 0;
  Array weights(s.dtype, n.weights, int(random() % 8)), keys(s.dtype, n.key_rows * s.dim, offset),
      additional(s.dtype, n.additional_rows * s.dim, offset), queries(s.dtype, n.rows * s.dim, offset);
  for (Array* a : {&weights, &keys, &additional}) a->fill_normal(random);
  poison_unseen(s, weights, random);
  NnParams params = {};
  static_cast<UnfusedShape&>(params) = s;
  params.weights = weights.data();
  params.keys = keys.data();
  params.additional_keys = s.additional > 0 ? additional.data() : nullptr;
  params.queries = queries.data();
  if (!run_twice([&] { return sm80::nn(params, nullptr, problem.precision, plan); }, {&queries}, random, error)) {
    return INFINITY;
  }
  const std::vector<double> w = weights.values(), k = keys.values(), ak = additional.values();
  std::vector<double> reference(n.rows * s.dim, 0);
  for_each_pair(s, [&](int64_t row, int64_t slot, int64_t key, int64_t additional_key, int64_t) {
    const double* other = additional_key < 0 ? &k[key * s.dim] : &ak[additional_key * s.dim];
    for (int c = 0; c < s.dim; ++c) reference[row * s.dim + c] += w[row * s.slots() + slot] * other[c];
  });
  return queries.intact() ? queries.error(reference) : INFINITY;
}

double check_in(const Problem& problem, const UnfusedPlan* plan, std::mt19937& random, cudaError_t& error) {
  const UnfusedShape& s = problem.shape;
  const Counts n(s);
  const int offset = random() % 8 == 0 ? 1 : 0;
  Array weights(s.dtype, n.weights, int(random() % 8)), queries(s.dtype, n.rows * s.dim, offset),
      keys(s.dtype, n.key_rows * s.dim, offset), additional(s.dtype, n.additional_rows * s.dim, offset),
      workspace(DType::kFloat32, in_workspace(s), 0);
  for (Array* a : {&weights, &queries}) a->fill_normal(random);
  poison_unseen(s, weights, random);
  InParams params = {};
  static_cast<UnfusedShape&>(params) = s;
  params.weights = weights.data();
  params.queries = queries.data();
  params.keys = keys.data();
  params.additional_keys = s.additional > 0 ? additional.data() : nullptr;
  params.workspace = workspace.data();
  params.workspace_size = in_workspace(s);
  if (!run_twice([&] { return sm80::in(params, nullptr, problem.precision, plan); }, {&keys, &additional}, random,
                 error)) {
    return INFINITY;
  }
  const std::vector<double> w = weights.values(), q = queries.values();
  std::vector<double> reference(n.key_rows * s.dim, 0), additional_reference(n.additional_rows * s.dim, 0);
  for_each_pair(s, [&](int64_t row, int64_t slot, int64_t key, int64_t additional_key, int64_t) {
    double* sum = additional_key < 0 ? &reference[key * s.dim] : &additional_reference[additional_key * s.dim];
    for (int c = 0; c < s.dim; ++c) sum[c] += w[row * s.slots() + slot] * q[row * s.dim + c];
  });
  if (!keys.intact() || !additional.intact() || !workspace.intact()) return INFINITY;
  return std::max(keys.error(reference), additional.error(additional_reference));
}

// ---- problems and plans

Problem random_unfused(std::mt19937& random, int i) {
  const driver::Problem base = driver::random_problem(random, i, {150, 18, 8});
  Problem problem;
  problem.name = base.name;
  UnfusedShape& s = problem.shape;
  s.neighborhood = base.shape.neighborhood;
  s.batch = 1 + random() % 2;
  s.kv_heads = 1 + random() % 2;
  s.heads = s.kv_heads * (random() % 3 == 0 ? 2 + random() % 2 : 1);
  const int dims[] = {8, 16, 24, 32, 32, 40, 64, 80, 96, 128, 160, 256};
  s.dim = random() % 6 == 0 ? 1 + int(random() % 100) : dims[random() % 12];
  const DType dtypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  s.dtype = dtypes[random() % 3];
  if (random() % 3 == 0) problem.precision = Precision::kTf32;
  if (random() % 3 == 0) s.additional = random() % 4 == 0 ? 60 + random() % 80 : 1 + random() % 9;
  if (random() % 4 == 0) s.bias_batch = random() % 2 ? s.batch : 1;
  s.fill_negative_infinity = random() % 2;
  return problem;
}

int divided(std::mt19937& random, int& budget) {
  int size = 1;
  while (budget > 1 && random() % 2) {
    size *= 2;
    budget /= 2;
  }
  return size;
}

UnfusedPlan random_plan(std::mt19937& random, const UnfusedShape& shape, Operation operation) {
  UnfusedPlan plan;
  for (int attempt = 0; attempt < 200; ++attempt) {
    plan = UnfusedPlan();
    int rows = sm80::kPartRows, warps = 1 << random() % 4;
    const int first = kMaxRank - shape.neighborhood.rank;
    for (int a = first; a < kMaxRank; ++a) {
      plan.row_part[a] = a == 2 ? rows : divided(random, rows);
      plan.row_tile[a] = plan.row_part[a] * (a == 2 ? warps : divided(random, warps));
    }
    const int sliced = first + random() % shape.neighborhood.rank;
    for (int a = first; a < kMaxRank; ++a) {
      plan.column_tile[a] = a < sliced    ? 1
                            : a == sliced ? 1 + random() % 40
                                          : std::min(shape.neighborhood.axes[a].length, 160);
    }
    if (sm80::why_not_plan(shape, operation, plan) == nullptr) return plan;
  }
  return sm80::choose_tiling(shape, operation).plan;
}

std::string to_string(const UnfusedPlan& plan) {
  std::string text;
  for (const int (&tile)[kMaxRank] :
       {std::cref(plan.row_tile), std::cref(plan.row_part), std::cref(plan.column_tile)}) {
    text += (text.empty() ? "" : ":") + std::to_string(tile[0]) + "," + std::to_string(tile[1]) + "," +
            std::to_string(tile[2]);
  }
  return text;
}

std::string describe(const Problem& problem) {
  const UnfusedShape& s = problem.shape;
  std::string text = s.dtype == DType::kFloat16              ? "f16"
                     : s.dtype == DType::kBFloat16           ? "bf16"
                     : problem.precision == Precision::kTf32 ? "tf32"
                                                             : "f32";
  text += " b" + std::to_string(s.batch) + " h" + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " d" +
          std::to_string(s.dim) + " +" + std::to_string(s.additional) + (s.has_bias() ? " bias" : "");
  for (int a = kMaxRank - s.neighborhood.rank; a < kMaxRank; ++a) {
    const Axis& axis = s.neighborhood.axes[a];
    text += " [" + std::to_string(axis.length) + " k" + std::to_string(axis.window) + " s" +
            std::to_string(axis.stride) + " d" + std::to_string(axis.dilation) + (axis.causal ? " causal]" : "]");
  }
  return text;
}

bool check(const Problem& problem, Operation operation, unsigned seed) {
  std::mt19937 random(seed + 7777 * unsigned(operation));
  const bool chosen = random() % 2;
  const UnfusedPlan plan =
      chosen ? sm80::choose_tiling(problem.shape, operation).plan : random_plan(random, problem.shape, operation);
  std::printf("%s %s | %s seed %u", kNames[int(operation)], describe(problem).c_str(), to_string(plan).c_str(), seed);
  std::fflush(stdout);
  if (const char* reason = sm80::why_not(problem.shape, operation)) {
    std::printf(" refused: %s\n", reason);
    return true;
  }
  const auto begin = std::chrono::steady_clock::now();
  cudaError_t status = cudaSuccess;
  const auto run = operation == Operation::kPn ? check_pn : operation == Operation::kNn ? check_nn : check_in;
  const double error = run(problem, chosen ? nullptr : &plan, random, status);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const bool good = status == cudaSuccess && error < tolerance(problem);
  std::printf(" %s error %.1e %.2f s %s\n", status == cudaSuccess ? "" : cudaGetErrorString(status), error,
              seconds.count(), good ? "ok" : "WRONG");
  return good;
}

int check_hard(double most) {
  int wrong = 0, count = 0;
  for (unsigned causal = 0; causal < 8; ++causal) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      for (const driver::Problem& hard : driver::hard_problems(DType::kBFloat16, causal)) {
        Problem problem;
        UnfusedShape& s = problem.shape;
        s.dtype = dtype;
        s.neighborhood = hard.shape.neighborhood;
        s.batch = hard.shape.batch;
        s.heads = hard.shape.heads;
        s.kv_heads = hard.shape.kv_heads;
        s.dim = hard.shape.dim;
        s.fill_negative_infinity = causal % 2;
        if (double(Counts(s).weights) * s.dim > most) continue;
        for (const Operation operation : {Operation::kPn, Operation::kNn, Operation::kIn}) {
          wrong += !check(problem, operation, ++count);
        }
      }
    }
  }
  std::printf("%d of %d problems wrong\n", wrong, count);
  return wrong != 0;
}

int print_plans() {
  constexpr DType t = DType::kBFloat16;
  for (const driver::Problem& problem : {
           driver::make_problem("seq", t, 8, 4, 4, 32, {8192}, {63}, {1}, {1}),
           driver::make_problem("seq_d8", t, 8, 4, 4, 32, {8192}, {63}, {1}, {8}),
           driver::make_problem("plane_k7", t, 16, 4, 4, 32, {56, 56}, {7, 7}, {1, 1}, {1, 1}),
           driver::make_problem("plane_k13", t, 16, 4, 4, 32, {56, 56}, {13, 13}, {1, 1}, {1, 1}),
           driver::make_problem("plane_k25", t, 4, 4, 4, 64, {64, 64}, {25, 25}, {1, 1}, {1, 1}),
           driver::make_problem("volume_k3", t, 4, 4, 4, 32, {16, 28, 28}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}),
           driver::make_problem("volume_k5_7_7", t, 1, 4, 4, 32, {14, 90, 90}, {5, 7, 7}, {1, 1, 1}, {1, 1, 1}),
       }) {
    UnfusedShape shape;
    shape.dtype = t;
    shape.neighborhood = problem.shape.neighborhood;
    shape.batch = problem.shape.batch;
    shape.heads = shape.kv_heads = problem.shape.heads;
    shape.dim = problem.shape.dim;
    for (const Operation operation : {Operation::kPn, Operation::kNn, Operation::kIn}) {
      const auto begin = std::chrono::steady_clock::now();
      const UnfusedPlan plan = sm80::choose_tiling(shape, operation).plan;
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      const sm80::UnfusedSizes sizes = sm80::sizes_of(shape, operation, plan);
      std::printf("%-14s %s %-32s warps %d list %3d slabs %d rows of a slab %d run chunks %d shared %d (%.1f ms)\n",
                  problem.name.c_str(), kNames[int(operation)], to_string(plan).c_str(), sizes.warps,
                  sizes.list[0] * sizes.list[1] * sizes.list[2], int(sizes.slabs), sizes.slab_size, sizes.run_chunks,
                  sizes.layout.bytes, 1e3 * seconds.count());
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--plans") == 0) return print_plans();
  if (argc > 1 && std::strcmp(argv[1], "--hard") == 0) return check_hard(argc > 2 ? std::atof(argv[2]) : 2e8);
  const int count = argc > 1 ? std::atoi(argv[1]) : 40;
  const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
  const char* only = argc > 3 ? argv[3] : "";
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    std::mt19937 random(seed + unsigned(i));
    const Problem problem = random_unfused(random, i);
    for (const Operation operation : {Operation::kPn, Operation::kNn, Operation::kIn}) {
      if (*only && std::strcmp(only, kNames[int(operation)]) != 0) continue;
      wrong += !check(problem, operation, seed + unsigned(i));
    }
  }
  std::printf("%d problems wrong\n", wrong);
  return wrong != 0;
}

}  // namespace
}  // namespace jax_natten::testing

int main(int argc, char** argv) { return jax_natten::testing::main(argc, argv); }
