// The compiled backward kernels, one file per head dimension.
#pragma once

#include "../common/tiling.h"
#include "forward_instances.h"

namespace jax_natten::sm80 {

// Functions of one BackwardParams.
KernelInstance backward_d32(DType dtype, Precision precision, Walk walk);
KernelInstance backward_d64(DType dtype, Precision precision, Walk walk);
KernelInstance backward_d96(DType dtype, Precision precision, Walk walk);
KernelInstance backward_d128(DType dtype, Precision precision, Walk walk);
KernelInstance backward_d192(DType dtype, Precision precision, Walk walk);
KernelInstance backward_d256(DType dtype, Precision precision, Walk walk);

}  // namespace jax_natten::sm80
