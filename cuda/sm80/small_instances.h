// The compiled forward kernels for small windows.
#pragma once

#include "forward_instances.h"

namespace jax_natten::sm80 {

// Functions of one SmallParams; `shared_bytes` is without the boxes, which come last. `list`: of kSmallLists.
KernelInstance small_forward(DType dtype, int dim, int list);

}  // namespace jax_natten::sm80
