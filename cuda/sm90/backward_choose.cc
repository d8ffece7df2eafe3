#include "backward_choose.h"

#include "backward_cost.h"
#include "search.h"

namespace jax_natten::sm90 {
namespace {

constexpr size_t kMostShapes = 12;

// What of `columns` is no power of two.
int odd_part(int columns) {
  while (columns % 2 == 0) columns /= 2;
  return columns == 1 ? 3 : columns;
}

class PassSearch {
 public:
  PassSearch(Walk pass, const FusedShape& shape, int processors, size_t count)
      : pass_(pass),
        shape_(shape),
        model_(pass, shape, processors),
        counts_(shape.neighborhood.axes, pass),
        best_(count) {}

  void variant(bool small) {
    const PassShape compiled = pass_shape(pass_, model_.dim, small);
    std::vector<int> column_sizes[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      column_sizes[a] = sizes_along(shape_.neighborhood.axes[a], compiled.columns, odd_part(compiled.columns));
    }
    const int least = smallest_of(column_sizes, compiled.columns);
    PassPlan plan;
    plan.small = small;
    for (const QueryShape& rows : query_shapes(shape_.neighborhood, counts_, compiled.parts, kPartRows, kMostShapes)) {
      copy(rows.tile, plan.query_tile);
      copy(rows.part, plan.query_part);
      each_triple(column_sizes, least, compiled.columns, [&](const Triple& columns) {
        copy(columns, plan.key_tile);
        propose(plan);
      });
    }
  }

  std::vector<PassCandidate> result() { return best_.sorted(); }

 private:
  void propose(const PassPlan& plan) {
    const double seconds = model_.predict(plan, counts_.count(plan, model_.is_padded(plan))).seconds;
    if (!best_.takes(seconds)) return;
    const double score = seconds * preference(plan, shape_.neighborhood.rank);
    if (!best_.takes(score) || why_not_pass(pass_, shape_, plan) != nullptr) return;
    best_.add({plan, seconds, score});
  }

  const Walk pass_;
  const FusedShape& shape_;
  const PassCostModel model_;
  AxisCounts counts_;
  Best<PassCandidate> best_;
};

struct Choice {
  bool any = false;
  BackwardPlan plan;
};

Choice choose(const FusedShape& shape, int processors) {
  const auto query = rank_pass_plans(kQueryPass, shape, processors, 1);
  const auto key = rank_pass_plans(kKeyPass, shape, processors, 1);
  if (query.empty() || key.empty()) return {};
  return {true, {query[0].plan, key[0].plan}};
}

}  // namespace

std::vector<PassCandidate> rank_pass_plans(Walk pass, const FusedShape& shape, int processors, int count) {
  if (count < 1 || why_not_any_backward(shape) != nullptr || is_empty(shape)) return {};
  PassSearch search(pass, shape, processors, size_t(count));
  search.variant(/*small=*/false);
  if (has_small_shape(compiled_head_dim(shape.dim))) search.variant(/*small=*/true);
  return search.result();
}

bool choose_backward_plan(const FusedShape& shape, int processors, BackwardPlan& plan) {
  static Remembered<Choice> known;
  const Choice choice = known.find(key_of(shape, processors), [&] { return choose(shape, processors); });
  if (choice.any) plan = choice.plan;
  return choice.any;
}

const char* why_not_backward(const FusedShape& shape) {
  if (const char* reason = why_not_any_backward(shape)) return reason;
  BackwardPlan plan;
  if (is_empty(shape) || choose_backward_plan(shape, kProcessors, plan)) return nullptr;
  return "takes up to 2^31 - 1 tiles";
}

Prediction predict_pass(Walk pass, const FusedShape& shape, const PassPlan& plan, int processors) {
  const PassCostModel model(pass, shape, processors);
  return model.predict(plan, count_tiles(shape.neighborhood, plan.query_tile, plan.query_part, plan.key_tile,
                                         model.is_padded(plan), pass));
}

}  // namespace jax_natten::sm90
