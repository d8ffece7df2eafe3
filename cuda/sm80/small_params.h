// What the kernels for small windows are told.
#pragma once

#include "backward_params.h"
#include "fused_params.h"

namespace jax_natten::sm80 {

// The box of columns that a CTA keeps in shared memory: in the forward of all that its rows see; in the backward, which
// goes through them box after box, it may hold fewer.
struct SmallBox {
  int box[kMaxRank];
  FastDivisor by_box1, by_box2;
  int box_rows;   // in all
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
