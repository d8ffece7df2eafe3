// The cost model behind backward_choose.h: seconds of a pass from its tile counts.
#pragma once

#include "backward_choose.h"

namespace jax_natten::sm90 {

// The constants of a problem's pass, found once for all of its plans.
struct PassCostModel {
  PassCostModel(Walk pass, const FusedShape& shape, int processors);

  // `counts`: of one head (in the key pass: of keys) of one batch element.
  Prediction predict(const PassPlan& plan, const TileCounts& counts) const;
  // Whether column tiles have columns without a partner, so that all of them are masked.
  bool is_padded(const PassPlan& plan) const;

  const Walk pass;
  const int rank;
  const int dim;  // that is compiled
  const int processors;
  double repeats;  // heads of rows and batch elements
  double group;    // heads of columns for each of those
  double pairs;    // of all of them
  double memory;   // seconds
};

}  // namespace jax_natten::sm90
