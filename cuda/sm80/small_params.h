// What the kernel for small windows is told. The columns of `places` are the keys of a warp's list.
#pragma once

#include "fused_params.h"

namespace jax_natten::sm80 {

struct SmallParams : FusedParams {
  int box[kMaxRank];   // most keys that a CTA's queries see along an axis
  int list[kMaxRank];  // the same of a warp's queries
  FastDivisor by_box1, by_box2;
  int boxes;      // bytes from the queries in shared memory to the keys' box, which that of the values follows
  int box_bytes;  // of each
};

}  // namespace jax_natten::sm80
