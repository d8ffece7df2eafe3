// How a fused forward is computed: by which kernel and with which tiles. Plain host code that needs no CUDA.
#pragma once

#include "../common/params.h"
#include "plan.h"

namespace jax_natten::sm80 {

// The head dimension of the kernels that take a problem.
int forward_compiled_dim(const FusedShape& shape);

// Whether it takes the kernels with additional keys and bias.
bool is_extended(const FusedShape& shape);

// Whether Structure::kTiles has kernels with so many rows for a problem.
bool forward_has_rows(const FusedShape& shape, int rows);

// What their tiles can hold.
TileLimits forward_limits(const FusedShape& shape, int rows);

// Why a plan does not fit a problem that a kernel takes; nullptr if it does.
const char* why_not_forward_plan(const FusedShape& shape, const Plan& plan);

// The plan that is followed by default. Not for empty problems.
Plan plan_forward(const FusedShape& shape);

}  // namespace jax_natten::sm80
