// Which plan is expected to compute a problem fastest: a cost model over exact tile counts, its constants fitted to
// measurements, and a search over tile shapes. Plain host code without CUDA: it is the simulator, too.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/tile_model.h"
#include "plan.h"

namespace jax_natten::sm90 {

// Multiprocessors of the GPU that the constants were fitted to (H100 in SXM form; an H200 has as many).
constexpr int kProcessors = 132;

// What bounds a plan.
enum class Bound { kCompute, kSharedMemory, kMemory };

struct Prediction {
  double seconds = 0;
  double compute = 0;        // seconds that the multiprocessors need for products and softmax
  double shared_memory = 0;  // to bring keys and values to shared memory, from the L2 cache
  double memory = 0;         // to read every input and write every output once
  TileCounts tiles;          // of all heads and batch elements
  double pairs = 0;          // query-key pairs inside windows, the useful ones
  double computed_pairs = 0;

  Bound bound() const {
    return memory >= compute && memory >= shared_memory ? Bound::kMemory
           : shared_memory >= compute                   ? Bound::kSharedMemory
                                                        : Bound::kCompute;
  }
};

// For a plan that fits the problem.
Prediction predict(const FusedShape& shape, const Plan& plan, int processors);

struct Candidate {
  Plan plan;
  double seconds;
  double score;  // seconds, with a preference among plans of equal work
};

// The `count` plans that are expected to be fastest, best first; fewer if there are not so many. None for a problem
// that no kernel takes or that is empty.
std::vector<Candidate> rank_plans(const FusedShape& shape, int processors, int count);

// The best plan, remembered by problem; false if there is none. Thread-safe.
bool choose_plan(const FusedShape& shape, int processors, Plan& plan);

// Why none of the kernels takes a problem, like why_not_any(), and by the choice as well; nullptr if one does.
const char* why_not(const FusedShape& shape);

}  // namespace jax_natten::sm90
