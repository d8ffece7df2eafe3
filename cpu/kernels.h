// The operations, compiled for several instruction sets.
#pragma once

#include "cuda/common/params.h"
#include "executor.h"

namespace jax_natten::cpu {

struct Kernels {
  const char* instruction_set;
  void (*fused_forward)(const FusedForwardParams&, Executor&);
  void (*fused_backward)(const FusedBackwardParams&, Executor&);
  void (*pn)(const PnParams&, Executor&);
  void (*nn)(const NnParams&, Executor&);
  void (*in)(const InParams&, Executor&);
};

// kernels_baseline.cc runs on every machine. The other two are there if the compiler could make them.
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// The kernels for the machine that this runs on. The environment variable JAX_NATTEN_CPU_ISA, one of "baseline", "avx2"
// and "avx512", picks smaller ones.
const Kernels& kernels();

}  // namespace jax_natten::cpu
