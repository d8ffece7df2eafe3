// The compiled forward kernels, one file per head dimension.
#pragma once

#include "../common/params.h"
#include "fused_params.h"

namespace jax_natten::sm80 {

struct KernelInstance {
  const void* function;  // of one FusedParams
  int threads, shared_bytes;
};

// `rows` of the query tile, as in forward_shape.h. `extended`: with additional keys and bias; for float32 always, and
// for 16-bit numbers only with 64 rows.
KernelInstance forward_d32(DType dtype, Precision precision, int rows, bool extended);
KernelInstance forward_d64(DType dtype, Precision precision, int rows, bool extended);
KernelInstance forward_d96(DType dtype, Precision precision, int rows, bool extended);
KernelInstance forward_d128(DType dtype, Precision precision, int rows, bool extended);
KernelInstance forward_d192(DType dtype, Precision precision, int rows, bool extended);
KernelInstance forward_d256(DType dtype, Precision precision, int rows, bool extended);

}  // namespace jax_natten::sm80
