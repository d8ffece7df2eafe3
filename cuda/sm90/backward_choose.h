// Which plans are expected to compute the two passes of the backward fastest, as choose.h has it for the forward. The
// passes do not depend on each other's tiles, so that each is chosen on its own.
#pragma once

#include <vector>

#include "backward_plan.h"
#include "choose.h"

namespace jax_natten::sm90 {

// For a plan that fits the problem. In the key pass the tiles are counted with key and query exchanged.
Prediction predict_pass(Walk pass, const FusedShape& shape, const PassPlan& plan, int processors);

struct PassCandidate {
  PassPlan plan;
  double seconds;
  double score;  // seconds, with a preference among plans of equal work
};

// The `count` plans that are expected to be fastest, best first; fewer if there are not so many. None for a problem
// that no kernel takes or that is empty.
std::vector<PassCandidate> rank_pass_plans(Walk pass, const FusedShape& shape, int processors, int count);

// The best plans, remembered by problem; false if there are none. Thread-safe.
bool choose_backward_plan(const FusedShape& shape, int processors, BackwardPlan& plan);

// Why none of the kernels takes a problem, like why_not_any_backward(), and by the choice as well; nullptr if one does.
const char* why_not_backward(const FusedShape& shape);

}  // namespace jax_natten::sm90
