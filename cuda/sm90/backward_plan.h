// How the backward of a problem is computed on Hopper, and which problems and tiles its kernels take. Plain host code
// without CUDA.
#pragma once

#include "backward_shape.h"
#include "plan.h"

namespace jax_natten::sm90 {

// How one of the two passes (backward_shape.h) is computed. The tiles of the key pass are those of the walk over the
// queries of keys: there `query_tile` holds keys and `key_tile` queries.
struct PassPlan : Tiles {
  bool small = false;  // the variant for small windows
};

struct BackwardPlan {
  PassPlan query, key;
};

// Heads whose rows a pass keeps.
inline int row_heads(Walk pass, const FusedShape& shape) { return pass == kQueryPass ? shape.heads : shape.kv_heads; }

// Why none of the backward's kernels can take a problem, in words that follow the name of the implementation; nullptr
// if they can.
const char* why_not_any_backward(const FusedShape& shape);

// Why a plan does not fit a problem; nullptr if it does. The first is about one pass, whose problem is one that the
// kernels can take.
const char* why_not_pass(Walk pass, const FusedShape& shape, const PassPlan& plan);
const char* why_not(const FusedShape& shape, const BackwardPlan& plan);

}  // namespace jax_natten::sm90
