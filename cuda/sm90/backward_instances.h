// The compiled instances of the backward's kernels, one translation unit per pass and head dimension.
#pragma once

#include "../common/params.h"
#include "backward_params.h"

namespace jax_natten::sm90 {

BackwardInstance backward_query_d32(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_query_d64(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_query_d96(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_query_d128(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_query_d192(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_query_d256(DType dtype, int rank, bool small, bool extended);

BackwardInstance backward_key_d32(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_key_d64(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_key_d96(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_key_d128(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_key_d192(DType dtype, int rank, bool small, bool extended);
BackwardInstance backward_key_d256(DType dtype, int rank, bool small, bool extended);

}  // namespace jax_natten::sm90
