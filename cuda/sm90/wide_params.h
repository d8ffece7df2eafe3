// What the "wide" kernel (wide_forward.cuh) is told.
#pragma once

#include <cstddef>

#include "forward_params.h"
#include "wide_shape.h"

namespace jax_natten::sm90 {

struct WideParams : ForwardParams {
  bool padded;  // key tiles have fewer keys than columns
};

using WideKernel = void (*)(WideParams);

// A compiled instance.
struct WideInstance {
  WideKernel kernel = nullptr;
  size_t shared_bytes = 0;
};

}  // namespace jax_natten::sm90
