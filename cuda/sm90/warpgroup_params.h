// What a kernel whose consumers are whole warpgroups (warpgroup_forward.cuh) is told.
#pragma once

#include <cstddef>

#include "forward_params.h"

namespace jax_natten::sm90 {

struct WarpgroupParams : ForwardParams {
  bool padded;  // key tiles have fewer keys than columns
};

using WarpgroupKernel = void (*)(WarpgroupParams);

// A compiled instance.
struct WarpgroupInstance {
  WarpgroupKernel kernel = nullptr;
  size_t shared_bytes = 0;
};

}  // namespace jax_natten::sm90
