// The cost model behind choose.h: seconds of a plan from its tile counts.
#pragma once

#include "choose.h"
#include "warpgroup_shape.h"

namespace jax_natten::sm90 {

constexpr double kLaunch = 5e-6;
constexpr double kMemoryBytesPerSecond = 3.9e12;
constexpr double kSharedBytesPerSecond = 10e12 / kProcessors;  // TMA from the L2 cache, per multiprocessor

// The largest of three bounds, and a little more where others are close to it: the 6-norm.
double join_bounds(double a, double b, double c);

// Query tiles that the busiest multiprocessor works on, if up to `blocks` CTAs share it; tiles cost about the same.
double most_tiles_of_processor(double tiles, int processors, int blocks);

// A problem's constants, found once for all of its plans.
struct CostModel {
  CostModel(const FusedShape& shape, int processors);

  // `counts`: of one head (of one box of heads) of one batch element.
  Prediction wide(const Plan& plan, const TileCounts& counts) const;
  Prediction middle(const Plan& plan, const TileCounts& counts) const;
  // `list`: keys that the kernel is compiled to gather; `blocks`: CTAs of a multiprocessor.
  Prediction warp(const Plan& plan, const TileCounts& counts, int list, int blocks) const;
  // No warp plan is expected to take fewer seconds.
  double least_warp() const;

  const FusedShape& shape;
  int processors;
  double repeats;  // heads and batch elements
  double pairs;    // of all of them
  double memory;   // seconds

 private:
  template <typename Compute>
  Prediction warpgroups(const Plan& plan, const TileCounts& counts, const WarpgroupShape& compiled, int blocks,
                        Compute compute) const;
};

}  // namespace jax_natten::sm90
