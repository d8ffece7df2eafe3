// What the kernels for small windows are told.
#pragma once

#include "backward_params.h"
#include "fused_params.h"

namespace jax_natten::sm80 {

// The box of all columns that a CTA's rows see, which it keeps in shared memory.
struct SmallBox {
  int box[kMaxRank];  // most columns that a CTA's rows see along an axis
  FastDivisor by_box1, by_box2;
  int box_bytes;  // of the columns of one array, after which those of the next one lie
};

// The columns of `places` are the keys of a warp's list.
struct SmallParams : FusedParams, SmallBox {
  int list[kMaxRank];  // most keys that a warp's queries see along an axis
};

// The columns of `places` are those of a segment of a warp's list.
struct SmallBackwardParams : BackwardParams, SmallBox {
  int groups;  // of 16 columns in a segment
};

static_assert(sizeof(SmallBackwardParams) <= 4096, "what a kernel can be told at most");

}  // namespace jax_natten::sm80
