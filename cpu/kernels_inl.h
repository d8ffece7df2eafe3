// The kernels of one instruction set: kernels_<isa>.cc defines JAX_NATTEN_ISA, is compiled with that set's flags and
// includes this.
#pragma once

#include "fused_backward.h"
#include "fused_forward.h"
#include "kernels.h"
#include "unfused.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// Calls the operation of the dtype's accumulation type.
#define JAX_NATTEN_OF_DTYPE(operation, Params)   \
  [](const Params& params, Executor& executor) { \
    if (params.dtype == DType::kFloat64) {       \
      operation<double>(params, executor);       \
    } else {                                     \
      operation<float>(params, executor);        \
    }                                            \
  }

constexpr Kernels make_kernels(const char* instruction_set) {
  return {instruction_set,
          JAX_NATTEN_OF_DTYPE(fused_forward, FusedForwardParams),
          JAX_NATTEN_OF_DTYPE(fused_backward, FusedBackwardParams),
          JAX_NATTEN_OF_DTYPE(pointwise_neighborhood, PnParams),
          JAX_NATTEN_OF_DTYPE(neighborhood_neighborhood, NnParams),
          JAX_NATTEN_OF_DTYPE(inverse_neighborhood, InParams)};
}

#undef JAX_NATTEN_OF_DTYPE

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
