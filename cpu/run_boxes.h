// Runs a lambda, or an operation that works box by box, as the tasks of an executor.
#pragma once

#include "arena.h"
#include "boxes.h"
#include "executor.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

template <typename F>
void parallel(Executor& executor, int64_t tasks, size_t scratch_bytes, const F& body) {
  executor.run(
      tasks, scratch_bytes,
      [](const void* context, int64_t task, void* scratch) { (*static_cast<const F*>(context))(task, scratch); },
      &body);
}

// An Operation has `boxes(params)`, a constructor that takes its scratch from an arena, and `run(task)`, where a task
// is a box of a batch element and key head.
template <template <typename> class Operation, typename Real, typename Params>
void run_boxes(const Params& params, Executor& executor) {
  if (params.batch * params.neighborhood.positions() == 0) return;
  const Boxes boxes = Operation<Real>::boxes(params);
  Arena measure(nullptr);
  Operation<Real>(params, boxes, measure);
  parallel(executor, params.batch * params.kv_heads * boxes.total, measure.used(), [&](int64_t task, void* scratch) {
    Arena arena(scratch);
    Operation<Real>(params, boxes, arena).run(task);
  });
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
