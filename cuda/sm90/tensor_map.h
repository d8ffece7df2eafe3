// Tensor maps (TMA descriptors) over [batch, X, heads, dim] tensors of 16-bit elements, as they lie in memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "../common/tiling.h"

namespace jax_natten::sm90 {

// How the kernels address a box of one head, batch element and dilation group. Maps have the dimensions
//   (channel, x2, x1, x0, slab), x being in-group indices,
// with slab = ((batch X0 + phase0) X1 + phase1) X2 + phase2) heads + head: a step of one slab is a step of `dim`
// elements. The slab dimension overlaps the others in memory, which the hardware does not mind; in return dilation and
// heads need no dimension of their own, elements outside a dilation group or past the head dimension read as zeros, and
// stores there are dropped.
struct SlabAddress {
  int per_batch = 0, per_phase[kMaxRank] = {0, 0, 0};

  template <int kRank>
  JAX_NATTEN_HD int slab(const QueryTile& tile, int head) const {
    int slab = tile.batch * per_batch + head;
    JAX_NATTEN_UNROLL
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) slab += tile.phase[a] * per_phase[a];
    return slab;
  }
};

SlabAddress slab_address(const Neighborhood& neighborhood, int heads);

struct TensorBox {
  int channels;           // per row: one swizzle span of 32 or 64 elements
  int heads;              // neighboring heads whose channels make a row
  int queries[kMaxRank];  // or keys
};

// Encodes a map whose group along axis a is a short one (the group of the last phase) if bit a of `short_groups` is
// set.
cudaError_t encode_tensor_map(CUtensorMap* map, const FusedShape& shape, const void* data, int heads,
                              const TensorBox& box, int short_groups);

// Encodes a map over additional keys or values [batch, additional, heads, dim] with the dimensions (channel, key, 1, 1,
// slab), slab = batch element * additional * heads + head. Rows of a box of `keys` are as in `box`.
cudaError_t encode_additional_map(CUtensorMap* map, const FusedShape& shape, const void* data, const TensorBox& box,
                                  int keys);

}  // namespace jax_natten::sm90
