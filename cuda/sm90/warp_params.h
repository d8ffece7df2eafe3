// What the "warp" kernel (warp_forward.cuh) is told.
#pragma once

#include <cstddef>
#include <cstdint>

#include "forward_params.h"

namespace jax_natten::sm90 {

constexpr int kWarpRows = 16;          // queries of a warp
constexpr int kWarpMostStages = 4;     // of the query and the key rings
constexpr int kWarpTableBytes = 4096;  // of shared memory, for WarpTables
constexpr int kWarpMostListed = 112;   // keys of a list, in whole groups of 16
constexpr int kWarpMostKeys = 32767;   // that a query tile sees along an axis

// Threads of the largest CTA, one warp of them the producer. The kernel may use all registers that this leaves.
constexpr int warp_most_threads(int dim) { return dim == 32 ? 512 : 352; }
constexpr int warp_registers(int dim) { return 65536 / warp_most_threads(dim) / 8 * 8; }

// Shared memory of a CTA, in bytes from its beginning.
struct WarpLayout {
  int query_bytes, key_bytes;  // of a chunk of a box, in whole swizzle patterns
  int keys;                    // after the queries
  int staging;                 // of outputs
  int tables;                  // WarpTables
  int bytes;
};

// schedule: key_tile: keys of a box; query_part: queries of a warp. mask_layout: of the list.
struct WarpParams : ForwardParams {
  bool plain;  // no axis has a stride or is causal
  int slots, stages, warps;
  WarpLayout layout;
  int list[kMaxRank];               // keys per axis that a warp gathers from a box
  int key_offset[kWarpMostListed];  // bytes from the first key of the list in a box to each other
};

using WarpKernel = void (*)(WarpParams);

}  // namespace jax_natten::sm90
