#include "backward_instances.cuh"
#include "backward_query.cuh"

namespace jax_natten::sm90 {

BackwardInstance backward_query_d128(DType dtype, int rank, bool small, bool extended) {
  return backward_instance<QueryPass, 128>(dtype, rank, small, extended);
}

}  // namespace jax_natten::sm90
