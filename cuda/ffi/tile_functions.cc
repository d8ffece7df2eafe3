#include "tile_functions.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../sm80/forward_plan.h"
#include "../sm80/forward_rank.h"
#include "../sm80/limits.h"
#include "../sm90/backward_choose.h"
#include "../sm90/choose.h"
#include "../sm90/plan.h"

namespace py = pybind11;

namespace jax_natten {
namespace {

using Ints = std::vector<int64_t>;

// A case as Python describes it. Throws std::invalid_argument on what no kernel could be told.
FusedShape shape_of(const std::string& dtype, int64_t batch, int64_t heads, int64_t kv_heads, int64_t dim,
                    int64_t value_dim, int64_t additional, bool has_bias, const Ints& grid, const Ints& kernel_size,
                    const Ints& stride, const Ints& dilation, const std::vector<bool>& is_causal) {
  const auto integer = [](int64_t x, int64_t least) {
    if (x < least || x > INT32_MAX) throw std::invalid_argument("takes sizes up to 2^31 - 1");
    return int(x);
  };
  FusedShape shape;
  shape.dtype = dtype == "float16"    ? DType::kFloat16
                : dtype == "bfloat16" ? DType::kBFloat16
                : dtype == "float32"  ? DType::kFloat32
                                      : DType::kFloat64;
  const size_t rank = grid.size();
  if (rank < 1 || rank > kMaxRank || kernel_size.size() != rank || stride.size() != rank || dilation.size() != rank ||
      is_causal.size() != rank) {
    throw std::invalid_argument("takes grids of one to three axes");
  }
  shape.neighborhood.rank = int(rank);
  for (size_t n = 0; n < rank; ++n) {
    shape.neighborhood.axes[kMaxRank - rank + n] =
        Axis{integer(grid[n], 0), integer(kernel_size[n], 1), integer(stride[n], 1), integer(dilation[n], 1),
             bool(is_causal[n])};
  }
  shape.batch = batch;
  shape.heads = integer(heads, 1);
  shape.kv_heads = integer(kv_heads, 1);
  shape.dim = integer(dim, 1);
  shape.value_dim = integer(value_dim, 1);
  shape.additional = integer(additional, 0);
  shape.bias_batch = has_bias ? 1 : 0;
  return shape;
}

// One argument list for all functions, which end with arguments of their own.
template <typename Result, typename... More>
auto with_shape(Result (*function)(const FusedShape&, More...)) {
  return [function](const std::string& dtype, int64_t batch, int64_t heads, int64_t kv_heads, int64_t dim,
                    int64_t value_dim, int64_t additional, bool has_bias, const Ints& grid, const Ints& kernel_size,
                    const Ints& stride, const Ints& dilation, const std::vector<bool>& is_causal, More... more) {
    return function(shape_of(dtype, batch, heads, kv_heads, dim, value_dim, additional, has_bias, grid, kernel_size,
                             stride, dilation, is_causal),
                    more...);
  };
}

using Reason = std::optional<std::string>;

Reason reason_of(const char* text) { return text == nullptr ? Reason() : Reason(text); }

// `operation`: as dispatch.Problem names it.
Reason sm80_why_not(const FusedShape& shape, std::string operation) {
  if (operation == "fused_forward") return reason_of(sm80::why_not_fused(shape));
  if (operation == "fused_backward") return reason_of(sm80::why_not_fused_backward(shape));
  UnfusedShape unfused;
  unfused.dtype = shape.dtype;
  unfused.neighborhood = shape.neighborhood;
  unfused.batch = shape.batch;
  unfused.heads = shape.heads;
  unfused.kv_heads = shape.kv_heads;
  unfused.dim = shape.dim;
  unfused.additional = shape.additional;
  unfused.bias_batch = shape.bias_batch;
  return reason_of(sm80::why_not(unfused, operation == "pn"   ? sm80::Operation::kPn
                                          : operation == "nn" ? sm80::Operation::kNn
                                                              : sm80::Operation::kIn));
}

Reason sm80_why_not_tiles(const FusedShape& shape, Ints tiles) {
  if (const char* reason = sm80::why_not_fused(shape)) return reason;
  sm80::Plan plan;
  if (const char* reason = sm80::decode_plan({tiles.data(), tiles.size()}, plan)) return reason;
  return reason_of(sm80::why_not_forward_plan(shape, plan));
}

// `operation`: likewise, one of the fused ones.
Reason sm90_why_not(const FusedShape& shape, std::string operation) {
  return reason_of(operation == "fused_backward" ? sm90::why_not_backward(shape) : sm90::why_not(shape));
}

Reason sm90_why_not_tiles(const FusedShape& shape, Ints tiles) {
  sm90::Plan plan;
  if (const char* reason = sm90::decode_plan({tiles.data(), tiles.size()}, plan)) return reason;
  return reason_of(sm90::why_not(shape, plan));
}

py::dict described(const TileCounts& tiles, double pairs, double computed_pairs) {
  py::dict result;
  result["query_tiles"] = tiles.query_tiles;
  result["visited"] = tiles.visited;
  result["computed"] = tiles.computed;
  result["masked"] = tiles.masked;
  result["pairs"] = pairs;
  result["computed_pairs"] = computed_pairs;
  return result;
}

py::dict described(const sm90::Prediction& p) {
  py::dict result = described(p.tiles, p.pairs, p.computed_pairs);
  result["cost"] = p.seconds;
  result["compute"] = p.compute;
  result["shared_memory"] = p.shared_memory;
  result["memory"] = p.memory;
  return result;
}

void check_not_empty(const FusedShape& shape) {
  if (sm90::is_empty(shape)) throw std::invalid_argument("nothing to compute");
}

py::dict sm90_predict(const FusedShape& shape, Ints tiles, int processors) {
  sm90::Plan plan;
  if (const char* reason = sm90::decode_plan({tiles.data(), tiles.size()}, plan)) throw std::invalid_argument(reason);
  if (const char* reason = sm90::why_not(shape, plan)) throw std::invalid_argument(reason);
  check_not_empty(shape);
  return described(sm90::predict(shape, plan, processors));
}

std::vector<Ints> sm90_rank(const FusedShape& shape, int processors, int count) {
  std::vector<Ints> ranked;
  for (const sm90::Candidate& candidate : sm90::rank_plans(shape, processors, count)) {
    const auto fields = sm90::encode_plan(candidate.plan);
    ranked.emplace_back(fields.begin(), fields.end());
  }
  return ranked;
}

py::dict sm80_count(const FusedShape& shape, Ints tiles) {
  if (const Reason reason = sm80_why_not_tiles(shape, tiles)) throw std::invalid_argument(*reason);
  check_not_empty(shape);
  sm80::Plan plan;
  sm80::decode_plan({tiles.data(), tiles.size()}, plan);
  const sm80::PlanWork work = sm80::count_work(shape, plan);
  py::dict result = described(work.tiles, work.pairs, work.computed_pairs);
  result["cost"] = work.cost;
  return result;
}

std::vector<Ints> sm80_rank(const FusedShape& shape, int count) {
  std::vector<Ints> ranked;
  for (const sm80::Plan& plan : sm80::rank_forward_plans(shape, count)) {
    const auto fields = sm80::encode_plan(plan);
    ranked.emplace_back(fields.begin(), fields.end());
  }
  return ranked;
}

// The best plans of a pass of the backward, "query" or "key", with what is expected of each: whether it is the variant
// for small windows, row tile, part and column tile.
std::vector<std::pair<Ints, py::dict>> sm90_rank_pass(const FusedShape& shape, std::string name, int processors,
                                                      int count) {
  const Walk pass = name == "query" ? sm90::kQueryPass : sm90::kKeyPass;
  std::vector<std::pair<Ints, py::dict>> ranked;
  for (const sm90::PassCandidate& candidate : sm90::rank_pass_plans(pass, shape, processors, count)) {
    const sm90::PassPlan& plan = candidate.plan;
    Ints fields = {plan.small};
    for (const auto* tile : {&plan.query_tile, &plan.query_part, &plan.key_tile}) {
      fields.insert(fields.end(), *tile, *tile + kMaxRank);
    }
    ranked.emplace_back(fields, described(sm90::predict_pass(pass, shape, plan, processors)));
  }
  return ranked;
}

}  // namespace

void add_tile_functions(py::module_& m) {
  m.attr("sm90_processors") = sm90::kProcessors;
  m.def("sm80_runs_on", sm80::runs_on, "Whether the kernels run on a compute capability, 90 for 9.0.");
  m.def("sm90_runs_on", sm90::runs_on, "Whether the kernels run on a compute capability, 90 for 9.0.");
  m.def("sm80_why_not", with_shape(sm80_why_not), "Why no sm_80 kernel takes a case of an operation, or None.");
  m.def("sm80_why_not_tiles", with_shape(sm80_why_not_tiles), "Why tiles do not fit a case, or None.");
  m.def("sm80_count", with_shape(sm80_count), "The work that tiles make.");
  m.def("sm80_rank", with_shape(sm80_rank), "Tiles worth trying, the default ones first.");
  m.def("sm90_why_not", with_shape(sm90_why_not), "Why no Hopper kernel takes a case, or None.");
  m.def("sm90_why_not_tiles", with_shape(sm90_why_not_tiles), "Why tiles do not fit a case, or None.");
  m.def("sm90_predict", with_shape(sm90_predict), "What the cost model expects of tiles.");
  m.def("sm90_rank", with_shape(sm90_rank), "The tiles that the cost model expects to be fastest, best first.");
  m.def("sm90_rank_pass", with_shape(sm90_rank_pass), "The same for a pass of the backward, with what it expects.");
}

}  // namespace jax_natten
