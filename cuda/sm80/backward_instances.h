// The compiled backward kernels, one file per head dimension.
#pragma once

#include "backward_shape.h"
#include "forward_instances.h"

namespace jax_natten::sm80 {

// Functions of one BackwardParams. None (null) where forward_shape.h has no such head dimension.
KernelInstance backward_d32(DType dtype, Precision precision, Pass pass);
KernelInstance backward_d64(DType dtype, Precision precision, Pass pass);
KernelInstance backward_d96(DType dtype, Precision precision, Pass pass);
KernelInstance backward_d128(DType dtype, Precision precision, Pass pass);
KernelInstance backward_d192(DType dtype, Precision precision, Pass pass);
KernelInstance backward_d256(DType dtype, Precision precision, Pass pass);

}  // namespace jax_natten::sm80
