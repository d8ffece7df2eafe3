// What every sm_90 forward kernel is told, whatever its structure.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "extension.h"
#include "tensor_map.h"
#include "tile_params.h"

namespace jax_natten::sm90 {

struct TensorMaps {
  CUtensorMap query, key, value, out;
};

struct ForwardParams : TileParams {
  TensorMaps maps[kMaxMapVariants];
  SlabAddress query_address, key_address;
  void* out;   // [batch, X, heads, dim]
  float* lse;  // [batch, X, heads]
  int dim;
  float scale;            // of the softmax: > 0, in powers of two
  uint32_t query_factor;  // pair of T that queries are multiplied with first. Carries the sign of the scale.
  bool has_query_factor;
  KeyExtension extension;  // for the extended variants only
};

}  // namespace jax_natten::sm90
