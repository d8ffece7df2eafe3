// The cost model behind choose.h: seconds of a plan from its tile counts.
#pragma once

#include "choose.h"

namespace jax_natten::sm90 {

// A problem's constants, found once for all of its plans.
struct CostModel {
  CostModel(const FusedShape& shape, int processors);

  // `counts`: of one head (of one box of heads) of one batch element.
  Prediction wide(const Plan& plan, const TileCounts& counts) const;
  // `list`: keys that the kernel is compiled to gather; `blocks`: CTAs of a multiprocessor.
  Prediction warp(const Plan& plan, const TileCounts& counts, int list, int blocks) const;
  // No warp plan is expected to take fewer seconds.
  double least_warp() const;

  const FusedShape& shape;
  int processors;
  double repeats;  // heads and batch elements
  double pairs;    // of all of them
  double memory;   // seconds
};

}  // namespace jax_natten::sm90
