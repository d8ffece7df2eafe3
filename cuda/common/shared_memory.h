// Shared memory beyond what every kernel may have without asking.
#pragma once

#include <cuda_runtime_api.h>

namespace jax_natten {

// Lets a kernel have `bytes` of dynamic shared memory on a device. Asks the driver once per kernel, size and device.
cudaError_t allow_shared_memory(const void* kernel, int device, int bytes);

}  // namespace jax_natten
