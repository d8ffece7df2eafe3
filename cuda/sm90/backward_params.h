// What the kernels of the backward are told.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "backward_shape.h"
#include "extension.h"
#include "tensor_map.h"
#include "tile_params.h"

namespace jax_natten::sm90 {

struct PassMaps {
  CUtensorMap row[kOperands], column[kOperands], result[kOperands];
};

struct BackwardParams : TileParams {
  PassMaps maps[kMaxMapVariants];
  SlabAddress row_address, column_address;
  int row_bytes, column_bytes;  // of all boxes of a part of a row tile; of one operand of a column tile
  bool padded;                  // column tiles have fewer columns than the kernel's
  int first_channel;   // of the rows' first operand; past the head dimension, where zeros are read, for scores of 0
  float exponent;      // P = 2^(exponent S - lse log2(e))
  float scale;         // of dQ and dK
  float lse_to_start;  // -log2(e) / exponent
  int dim;
  const void* out;           // [batch, X, heads, dim]
  const float *lse, *d_lse;  // [batch, X, heads]

  // In the workspace, [batch, heads, X] each: what the accumulators of S and of dP start with in the key pass, so that
  // no operand of P and dS has to be loaded once the products are done. Written by the query pass. Heads before
  // positions, because the key pass gathers runs of positions.
  float* start[kOperands];  // lse_to_start lse, and -delta
  SlabAddress start_address;
  int positions;
  int position_step[kMaxRank];  // positions between neighboring in-group positions of an axis

  // For the extended variants only. The additional keys of the query pass are columns behind those of the window box.
  // In the key pass they are rows of launches of their own: see backward_additional.h.
  KeyExtension extension;
  float* partials = nullptr;     // of those launches: [batch, chunks, additional, kv_heads, keys and values, dim]
  int most_columns = INT32_MAX;  // along an axis: there may be more additional keys than positions
};

using BackwardKernel = void (*)(BackwardParams);

// A compiled instance.
struct BackwardInstance {
  BackwardKernel kernel = nullptr;
  size_t shared_bytes = 0;
};

}  // namespace jax_natten::sm90
