// The fused sm_80 kernels against the definition, on the CPU.
//
//   test_sm80_fused [N [SEED [forward|backward]]]   N random problems under random plans (default 30, 0)
//   test_sm80_fused small [N [SEED]]                    backwards for small windows only
//   test_sm80_fused hard                                the hard problems of ../gpu/problems.h (minutes)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../gpu/problems.h"
#include "backward_reference.h"
#include "cuda/common/workspace.h"
#include "cuda/sm80/forward_instances.h"
#include "cuda/sm80/forward_shape.h"
#include "cuda/sm80/fused.h"
#include "emulator.h"
#include "reference.h"

namespace jax_natten::testing {
namespace {

// `dim`, or a larger head dimension if the kernels for it are not linked.
int linked_dim(DType dtype, int dim) {
  static constexpr decltype(&sm80::forward_d32) kInstances[] = {sm80::forward_d32,  sm80::forward_d64,
                                                                sm80::forward_d96,  sm80::forward_d128,
                                                                sm80::forward_d192, sm80::forward_d256};
  const int own = sm80::forward_dim(int(element_bytes(dtype)), dim);
  for (int i = 0; i < 6; ++i) {
    const int compiled = sm80::kForwardDims[i];
    if (compiled < own || kInstances[i](dtype, sm80::Precision::kTf32, 64, false).function == nullptr) continue;
    return compiled == own ? dim : compiled - dim % 8;
  }
  return 0;
}

using sm80::Plan;
using sm80::Precision;
using sm80::Structure;

struct Case {
  driver::Problem problem;
  Precision precision = Precision::kTf32;
  unsigned seed = 0;
  bool small = false;  // both passes of the backward under plans of Structure::kSmall
};

// ---- random cases

void random_tile(std::mt19937& random, int rank, int most, int (&tile)[kMaxRank]) {
  std::fill(tile, tile + kMaxRank, 1);
  std::vector<int> axes;
  for (int a = kMaxRank - rank; a < kMaxRank; ++a) axes.push_back(a);
  std::shuffle(axes.begin(), axes.end(), random);
  for (size_t i = 0; i < axes.size(); ++i) {
    const bool all = i + 1 == axes.size() && random() % 4 != 0;
    tile[axes[i]] = all ? most : 1 + int(random() % (i + 1 == axes.size() ? most : std::min(most, 16)));
    most /= tile[axes[i]];
  }
}

Plan random_plan(std::mt19937& random, const FusedShape& shape, const char* (*why_not)(const FusedShape&, const Plan&),
                 const Plan& fallback, bool small = false) {
  const int rank = shape.neighborhood.rank;
  for (int attempt = 0; attempt < 300; ++attempt) {
    Plan plan;
    if (small || random() % 2) plan.structure = Structure::kSmall;
    const int warps = random() % 8 ? 4 : random() % 4 ? 2 : 1;
    plan.rows = warps < 4 ? 16 * warps : random() % 2 ? 64 : 128;
    random_tile(random, rank, plan.rows / warps, plan.query_part);
    if (plan.structure == Structure::kTiles) {
      random_tile(random, rank, random() % 2 ? 64 : random() % 2 ? 32 : 16, plan.key_tile);
    }
    std::copy(plan.query_part, plan.query_part + kMaxRank, plan.query_tile);
    for (int left = warps; left > 1; left /= 2) plan.query_tile[kMaxRank - 1 - int(random()) % rank] *= 2;
    if (why_not(shape, plan) == nullptr) return plan;
  }
  return fallback;
}

Case random_case(unsigned seed) {
  std::mt19937 random(seed);
  Case c;
  c.seed = seed;
  c.problem = driver::random_problem(random, int(seed), {150, 18, 8});
  FusedShape& shape = c.problem.shape;
  if (random() % 4 == 0) shape.dtype = DType::kFloat32;
  if (random() % 2) c.precision = Precision::kSplitTf32;
  const int dims[] = {1, 2, 3, 7, 12, 20, 33, 50, 64, 100, 128, 130, 256};
  if (random() % 3 == 0) shape.dim = dims[random() % 13];
  if (random() % 3 == 0) {
    shape.value_dim = dims[random() % 13];
  } else {
    shape.value_dim = shape.dim;
  }
  const int dim = std::max(shape.dim, shape.value_dim), linked = linked_dim(shape.dtype, dim);
  if (shape.dim == dim) shape.dim = linked;
  if (shape.value_dim == dim) shape.value_dim = linked;
  if (random() % 5 == 0) shape.additional = 1 + int(random() % 80);
  // Wide heads and many of them take long.
  if (shape.batch * shape.neighborhood.positions() * shape.heads * linked > 60000) {
    shape.batch = 1;
    shape.heads /= shape.kv_heads;
    shape.kv_heads = 1;
  }
  bool causal = false;
  for (const Axis& axis : shape.neighborhood.axes) causal = causal || axis.causal;
  if (!causal && random() % 2) shape.bias_batch = random() % 2 ? shape.batch : 1;
  return c;
}

// Every head dimension up to 64, though of the kernels that pass tiles by those for 64 are not linked: so no gradient
// of the bias with that one.
Case random_small_case(unsigned seed) {
  std::mt19937 random(seed);
  Case c;
  c.small = true;
  c.seed = seed;
  do {
    c.problem = driver::random_problem(random, int(seed), {400, 30, 11});
  } while (c.problem.shape.neighborhood.window_size() > 256);
  FusedShape& shape = c.problem.shape;
  const int dims[] = {1, 3, 8, 12, 20, 24, 32, 32, 33, 40, 50, 56, 64, 64};
  shape.dim = dims[random() % 14];
  shape.value_dim = random() % 2 ? shape.dim : dims[random() % 14];
  if (shape.batch * shape.neighborhood.positions() * shape.heads > 3000) {
    shape.batch = 1;
    shape.heads /= shape.kv_heads;
    shape.kv_heads = 1;
  }
  bool causal = false;
  for (const Axis& axis : shape.neighborhood.axes) causal = causal || axis.causal;
  if (!causal && std::max(shape.dim, shape.value_dim) <= 32 && random() % 2) {
    shape.bias_batch = random() % 2 ? shape.batch : 1;
  }
  return c;
}

std::string describe(const Plan& plan) {
  std::string text = (plan.structure == Structure::kSmall ? "small " : "") + std::to_string(plan.rows);
  for (const auto* tile : {&plan.query_tile, &plan.query_part, &plan.key_tile}) {
    text += " " + std::to_string((*tile)[0]) + "," + std::to_string((*tile)[1]) + "," + std::to_string((*tile)[2]);
  }
  return text;
}

std::string describe(const Case& c) {
  const FusedShape& shape = c.problem.shape;
  std::string text = driver::describe(shape) + " Dv" + std::to_string(shape.value_dim);
  if (shape.dtype == DType::kFloat32) text += c.precision == Precision::kTf32 ? " as tf32" : " as 3xtf32";
  if (shape.additional > 0) text += " additional " + std::to_string(shape.additional);
  if (shape.has_bias()) text += " bias " + std::to_string(shape.bias_batch);
  return text;
}

// ---- arrays

class Arrays {
 public:
  explicit Arrays(unsigned seed) : random_(seed) {}

  // Filled with normally distributed numbers.
  void* input(DType dtype, int64_t count) {
    std::normal_distribution<double> normal;
    void* data = allocate(count * element_bytes(dtype), 0xA5);
    for (int64_t i = 0; i < count; ++i) from_double(dtype, normal(random_), data, i);
    return data;
  }
  // Filled with NaN.
  void* output(DType dtype, int64_t count) { return allocate(count * element_bytes(dtype), 0xFF); }

  bool intact() const {
    return std::all_of(arrays_.begin(), arrays_.end(), [](const auto& array) { return array->intact(); });
  }

 private:
  void* allocate(int64_t bytes, uint8_t fill) {
    arrays_.push_back(std::make_unique<emulator::Memory>(size_t(bytes), fill));
    return arrays_.back()->data();
  }
  std::mt19937 random_;
  std::vector<std::unique_ptr<emulator::Memory>> arrays_;
};

// Errors that rounding inputs of products to the type explains.
double tolerance(const Case& c) {
  switch (c.problem.shape.dtype) {
    case DType::kFloat16:
      return 1.5e-3;
    case DType::kBFloat16:
      return 8e-3;
    default:
      return c.precision == Precision::kTf32 ? 2e-3 : 5e-6;
  }
}

// Fills the inputs that the forward and the backward share.
template <typename Params>
void fill_inputs(const FusedShape& shape, Arrays& arrays, Params& params) {
  const int64_t rows = shape.batch * shape.neighborhood.positions(), extra = shape.batch * shape.additional;
  static_cast<FusedShape&>(params) = shape;
  params.query = arrays.input(shape.dtype, rows * shape.heads * shape.dim);
  params.key = arrays.input(shape.dtype, rows * shape.kv_heads * shape.dim);
  params.value = arrays.input(shape.dtype, rows * shape.kv_heads * shape.value_dim);
  params.additional_keys = arrays.input(shape.dtype, extra * shape.kv_heads * shape.dim);
  params.additional_values = arrays.input(shape.dtype, extra * shape.kv_heads * shape.value_dim);
  params.bias = arrays.input(DType::kFloat32, shape.bias_batch * shape.heads * shape.neighborhood.bias_size());
}

void configure_emulator(unsigned seed) {
  emulator::Settings settings;
  settings.seed = seed;
  settings.capability[0] = 8;
  settings.capability[1] = 0;
  emulator::configure(settings);
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Makes a key NaN: queries that see it become NaN, and no bit of the others changes.
bool check_poisoned_key(const Case& c, const Plan& plan, const FusedForwardParams& params) {
  const FusedShape& shape = c.problem.shape;
  const int64_t positions = shape.neighborhood.positions(), poisoned = c.seed % positions;
  const int64_t row_bytes = shape.heads * shape.value_dim * element_bytes(shape.dtype);
  const int64_t bytes = shape.batch * positions * row_bytes;
  const std::vector<uint8_t> before(static_cast<uint8_t*>(params.out), static_cast<uint8_t*>(params.out) + bytes);
  for (int64_t i = 0; i < shape.kv_heads * shape.dim; ++i) {
    from_double(shape.dtype, NAN, const_cast<void*>(params.key), poisoned * shape.kv_heads * shape.dim + i);
  }
  configure_emulator(c.seed + 1);
  if (sm80::fused_forward(params, c.precision, plan, nullptr) != cudaSuccess) return false;
  for (int64_t row = 0; row < shape.batch * positions; ++row) {
    bool sees = false;
    if (row < positions)
      for_each_neighbor(shape.neighborhood, row, [&](int64_t key, int64_t) { sees |= key == poisoned; });
    const auto* out = static_cast<const uint8_t*>(params.out) + row * row_bytes;
    const bool same = std::equal(out, out + row_bytes, &before[row * row_bytes]);
    if (sees == same) return false;
    if (sees && !std::isnan(to_double(shape.dtype, out, 0))) return false;
  }
  return true;
}

bool check_forward(const Case& c) {
  const FusedShape& shape = c.problem.shape;
  std::mt19937 random(c.seed);
  if (const char* reason = sm80::why_not_fused(shape)) {
    std::printf("%s refused: %s\n", c.problem.name.c_str(), reason);
    return false;
  }
  Plan plan = sm80::plan_forward(shape);
  if (random() % 2) plan = random_plan(random, shape, sm80::why_not_forward_plan, plan);
  std::printf("forward  %-10s %s | %s", c.problem.name.c_str(), describe(c).c_str(), describe(plan).c_str());
  std::fflush(stdout);
  Arrays arrays(c.seed);
  FusedForwardParams params = {};
  fill_inputs(shape, arrays, params);
  const int64_t rows = shape.batch * shape.neighborhood.positions() * shape.heads;
  params.out = arrays.output(shape.dtype, rows * shape.value_dim);
  params.lse = arrays.output(DType::kFloat32, rows);
  configure_emulator(c.seed);
  const auto begin = std::chrono::steady_clock::now();
  if (const cudaError_t error = sm80::fused_forward(params, c.precision, plan, nullptr)) {
    std::printf(" FAILED: %s\n", cudaGetErrorString(error));
    return false;
  }
  const double seconds = seconds_since(begin);
  const ForwardReference reference = reference_forward(params);
  const double out_error = relative_error(reference.out, shape.dtype, params.out);
  const double lse_error = largest_difference(reference.lse, DType::kFloat32, params.lse);
  const bool exact = shape.dtype != DType::kFloat32 || c.precision == Precision::kSplitTf32;
  const bool contained = c.seed % 4 != 0 || check_poisoned_key(c, plan, params);
  const bool good = out_error < tolerance(c) && lse_error < (exact ? 1e-3 : 2e-2) && contained && arrays.intact();
  std::printf(" error %.1e lse %.1e%s%s %.1f s %s\n", out_error, lse_error, contained ? "" : " poison spreads",
              arrays.intact() ? "" : " written outside", seconds, good ? "ok" : "WRONG");
  return good;
}

const char* why_not_queries(const FusedShape& shape, const Plan& plan) {
  return sm80::why_not_backward_plan(shape, {plan, sm80::plan_backward(shape).keys, sm80::plan_backward(shape).bias});
}
const char* why_not_keys(const FusedShape& shape, const Plan& plan) {
  return sm80::why_not_backward_plan(shape,
                                     {sm80::plan_backward(shape).queries, plan, sm80::plan_backward(shape).bias});
}

const char* why_not_bias(const FusedShape& shape, const Plan& plan) {
  return sm80::why_not_backward_plan(shape,
                                     {sm80::plan_backward(shape).queries, sm80::plan_backward(shape).keys, plan});
}

bool check_backward(const Case& c) {
  const FusedShape& shape = c.problem.shape;
  std::mt19937 random(c.seed);
  if (const char* reason = sm80::why_not_fused_backward(shape)) {
    std::printf("%s refused: %s\n", c.problem.name.c_str(), reason);
    return false;
  }
  sm80::BackwardPlan plan = sm80::plan_backward(shape);
  if (c.small || random() % 2) plan.queries = random_plan(random, shape, why_not_queries, plan.queries, c.small);
  if (c.small || random() % 2) plan.keys = random_plan(random, shape, why_not_keys, plan.keys, c.small);
  if (shape.has_bias() && random() % 2) plan.bias = random_plan(random, shape, why_not_bias, plan.bias);
  std::printf("backward %-10s %s | %s | %s", c.problem.name.c_str(), describe(c).c_str(),
              describe(plan.queries).c_str(), describe(plan.keys).c_str());
  std::fflush(stdout);
  Arrays arrays(c.seed);
  FusedForwardParams forward = {};
  fill_inputs(shape, arrays, forward);
  const int64_t positions = shape.neighborhood.positions(), rows = shape.batch * positions * shape.heads;
  const int64_t keys = shape.batch * positions * shape.kv_heads,
                extra = shape.batch * shape.additional * shape.kv_heads;
  const ForwardReference reference_of_forward = reference_forward(forward);
  void* out = arrays.output(shape.dtype, rows * shape.value_dim);
  void* lse = arrays.output(DType::kFloat32, rows);
  for (int64_t i = 0; i < rows * shape.value_dim; ++i) from_double(shape.dtype, reference_of_forward.out[i], out, i);
  for (int64_t i = 0; i < rows; ++i) from_double(DType::kFloat32, reference_of_forward.lse[i], lse, i);
  FusedBackwardParams params = {};
  static_cast<FusedShape&>(params) = shape;
  params.query = forward.query;
  params.key = forward.key;
  params.value = forward.value;
  params.additional_keys = forward.additional_keys;
  params.additional_values = forward.additional_values;
  params.bias = forward.bias;
  params.out = out;
  params.lse = lse;
  params.d_out = arrays.input(shape.dtype, rows * shape.value_dim);
  params.d_lse = arrays.input(DType::kFloat32, rows);
  const auto run = [&] {
    params.d_query = arrays.output(shape.dtype, rows * shape.dim);
    params.d_key = arrays.output(shape.dtype, keys * shape.dim);
    params.d_value = arrays.output(shape.dtype, keys * shape.value_dim);
    params.d_additional_keys = arrays.output(shape.dtype, extra * shape.dim);
    params.d_additional_values = arrays.output(shape.dtype, extra * shape.value_dim);
    params.d_bias = arrays.output(DType::kFloat32, shape.bias_batch * shape.heads * shape.neighborhood.bias_size());
    params.workspace_size = fused_backward_workspace(shape);
    params.workspace = arrays.output(DType::kFloat32, params.workspace_size);
    return sm80::fused_backward(params, c.precision, plan, nullptr);
  };
  configure_emulator(c.seed);
  const auto begin = std::chrono::steady_clock::now();
  if (const cudaError_t error = run()) {
    std::printf(" FAILED: %s\n", cudaGetErrorString(error));
    return false;
  }
  const double seconds = seconds_since(begin);
  const BackwardReference reference = reference_backward(params);
  const double errors[] = {relative_error(reference.d_query, shape.dtype, params.d_query),
                           relative_error(reference.d_key, shape.dtype, params.d_key),
                           relative_error(reference.d_value, shape.dtype, params.d_value),
                           relative_error(reference.d_additional_keys, shape.dtype, params.d_additional_keys),
                           relative_error(reference.d_additional_values, shape.dtype, params.d_additional_values),
                           relative_error(reference.d_bias, DType::kFloat32, params.d_bias)};
  const FusedBackwardParams once = params;
  bool same = true;
  if (c.seed % 4 == 0) {  // the same bits in another order of threads
    configure_emulator(c.seed + 1);
    same = run() == cudaSuccess;
    const int64_t bytes = element_bytes(shape.dtype);
    same = same && std::memcmp(once.d_query, params.d_query, rows * shape.dim * bytes) == 0 &&
           std::memcmp(once.d_key, params.d_key, keys * shape.dim * bytes) == 0 &&
           std::memcmp(once.d_value, params.d_value, keys * shape.value_dim * bytes) == 0 &&
           std::memcmp(once.d_additional_keys, params.d_additional_keys, extra * shape.dim * bytes) == 0 &&
           std::memcmp(once.d_additional_values, params.d_additional_values, extra * shape.value_dim * bytes) == 0 &&
           std::memcmp(once.d_bias, params.d_bias, reference.d_bias.size() * sizeof(float)) == 0;
  }
  bool good = same && arrays.intact();
  std::printf(" errors");
  for (const double error : errors) {
    good = good && error < 2 * tolerance(c);
    std::printf(" %.1e", error);
  }
  std::printf("%s%s %.1f s %s\n", same ? "" : " differs", arrays.intact() ? "" : " written outside", seconds,
              good ? "ok" : "WRONG");
  return good;
}

// Without queries there are no outputs, and sums over them are zero.
bool check_empty() {
  FusedShape shape = driver::make_problem("empty", DType::kBFloat16, 2, 2, 1, 32, {0}, {1}, {1}, {1}).shape;
  shape.additional = 3;
  shape.bias_batch = 1;
  Arrays arrays(0);
  FusedForwardParams forward = {};
  fill_inputs(shape, arrays, forward);
  FusedBackwardParams backward = {};
  static_cast<FusedShape&>(backward) = shape;
  backward.d_additional_keys = arrays.output(shape.dtype, 2 * 3 * 32);
  backward.d_additional_values = arrays.output(shape.dtype, 2 * 3 * 32);
  backward.d_bias = arrays.output(DType::kFloat32, 2);
  const bool good = sm80::fused_forward(forward, Precision::kTf32, nullptr) == cudaSuccess &&
                    sm80::fused_backward(backward, Precision::kTf32, nullptr) == cudaSuccess &&
                    largest_difference(std::vector<double>(192, 0), shape.dtype, backward.d_additional_keys) == 0 &&
                    largest_difference(std::vector<double>(192, 0), shape.dtype, backward.d_additional_values) == 0 &&
                    largest_difference(std::vector<double>(2, 0), DType::kFloat32, backward.d_bias) == 0;
  std::printf("empty %s\n", good ? "ok" : "WRONG");
  return good;
}

// Which structure the passes of the backward have by default.
bool check_choices() {
  const auto structures = [](FusedShape shape, bool small) {
    const sm80::BackwardPlan plan = sm80::plan_backward(shape);
    return sm80::why_not_backward_plan(shape, plan) == nullptr &&
           (plan.queries.structure == Structure::kSmall) == small &&
           (plan.keys.structure == Structure::kSmall) == small && plan.bias.structure == Structure::kTiles;
  };
  const FusedShape plane =
      driver::make_problem("", DType::kFloat16, 1, 2, 2, 32, {56, 56}, {7, 7}, {1, 1}, {1, 1}).shape;
  const FusedShape line = driver::make_problem("", DType::kBFloat16, 1, 2, 2, 64, {512}, {15}, {1}, {1}).shape;
  const FusedShape wide =
      driver::make_problem("", DType::kFloat16, 1, 2, 2, 32, {56, 56}, {32, 32}, {1, 1}, {1, 1}).shape;
  FusedShape exact = plane, additional = plane, biased = plane, deep = plane;
  exact.dtype = DType::kFloat32;
  additional.additional = 1;
  biased.bias_batch = 1;
  deep.dim = deep.value_dim = 65;
  sm80::BackwardPlan of_bias = sm80::plan_backward(biased);
  of_bias.bias = of_bias.queries;
  const bool good = structures(plane, true) && structures(line, true) && structures(biased, true) &&
                    structures(wide, false) && structures(exact, false) && structures(additional, false) &&
                    structures(deep, false) && sm80::why_not_backward_plan(biased, of_bias) != nullptr &&
                    sm80::why_not_backward_plan(additional, sm80::plan_backward(plane)) != nullptr;
  std::printf("choices %s\n", good ? "ok" : "WRONG");
  return good;
}

// The hard problems of the GPU driver, with every combination of causal axes.
int check_hard_problems() {
  int wrong = 0;
  for (unsigned causal = 0; causal < 8; ++causal) {
    for (const driver::Problem& problem : driver::hard_problems(DType::kBFloat16, causal)) {
      Case c;
      c.problem = problem;
      c.seed = causal + 1;
      const int64_t pairs = problem.shape.neighborhood.positions() * problem.shape.neighborhood.window_size();
      if (pairs > 3000000) continue;  // would take minutes
      if (linked_dim(problem.shape.dtype, problem.shape.dim) != problem.shape.dim) continue;
      wrong += !check_forward(c) + !check_backward(c);
    }
  }
  return wrong;
}

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "hard") return check_hard_problems() != 0;
  if (argc > 1 && std::string(argv[1]) == "small") {
    const int count = argc > 2 ? std::atoi(argv[2]) : 30;
    const unsigned seed = argc > 3 ? unsigned(std::atoi(argv[3])) : 0;
    int wrong = !check_choices();
    for (int i = 0; i < count; ++i) wrong += !check_backward(random_small_case(seed + unsigned(i)));
    std::printf("%d of %d problems wrong\n", wrong, count);
    return wrong != 0;
  }
  const int count = argc > 1 ? std::atoi(argv[1]) : 30;
  const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
  const std::string only = argc > 3 ? argv[3] : "";
  const bool only_forward = only == "forward", only_backward = only == "backward";
  int wrong = !check_empty();
  for (int i = 0; i < count; ++i) {
    const Case c = random_case(seed + unsigned(i));
    wrong += !(only_backward || check_forward(c)) + !(only_forward || check_backward(c));
  }
  std::printf("%d of %d problems wrong\n", wrong, count);
  return wrong != 0;
}

}  // namespace
}  // namespace jax_natten::testing

int main(int argc, char** argv) { return jax_natten::testing::main(argc, argv); }
