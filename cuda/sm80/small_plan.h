// Plans of the forward kernel for small windows: which fit, and which is best. Plain host code that needs no CUDA.
#pragma once

#include "../common/params.h"
#include "plan.h"

namespace jax_natten::sm80 {

// Why a plan of Structure::kSmall does not fit a problem; nullptr if it does.
const char* why_not_small(const FusedShape& shape, const Plan& plan);

// The best plan of that structure; false if none fits.
bool plan_small(const FusedShape& shape, Plan& plan);

// What its query tiles take, in keys that 64 queries multiply.
double cost_of_small_tile(const int (&list)[kMaxRank], const int (&box)[kMaxRank]);

}  // namespace jax_natten::sm80
