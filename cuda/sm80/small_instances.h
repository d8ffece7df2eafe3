// The compiled kernels for small windows.
#pragma once

#include "forward_instances.h"

namespace jax_natten::sm80 {

// `shared_bytes` is without the boxes, which come last.
// Functions of one SmallParams. `list`: of kSmallLists.
KernelInstance small_forward(DType dtype, int dim, int list);
// Functions of one SmallBackwardParams: the two passes.
KernelInstance small_backward_query(DType dtype, int dim);
KernelInstance small_backward_key(DType dtype, int dim);

}  // namespace jax_natten::sm80
