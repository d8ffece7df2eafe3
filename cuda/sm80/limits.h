// What the sm_80 kernels take. Plain host code that needs no CUDA, since Python asks when a program is lowered.
#pragma once

#include "../common/params.h"
#include "unfused_params.h"

namespace jax_natten::sm80 {

inline bool runs_on(int compute_capability) { return compute_capability >= 80; }

// Why no kernel takes a problem, in words that follow the name of the implementation; nullptr if one does.
const char* why_not_fused(const FusedShape& shape);
const char* why_not_fused_backward(const FusedShape& shape);
const char* why_not(const UnfusedShape& shape, Operation operation);

// Tiles of the additional keys of a head in the backward.
int64_t additional_key_tiles(const FusedShape& shape);

}  // namespace jax_natten::sm80
