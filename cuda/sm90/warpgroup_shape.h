// What a kernel whose consumers are whole warpgroups (warpgroup_forward.cuh) is compiled for. Plain code without CUDA.
#pragma once

namespace jax_natten::sm90 {

// Compile-time shape of such a kernel for a head dimension; smaller head dimensions are padded with zeros by the TMA.
struct WarpgroupShape {
  int dim;
  int keys;         // columns of a key tile
  int stages;       // of the key and value rings
  int query_slots;  // query tiles in shared memory
  int chunk;        // channels of a shared-memory row, which is one swizzle span of 128 or 64 bytes

  constexpr int chunks() const { return dim / chunk; }
  constexpr int row_bytes() const { return 2 * chunk; }
};

constexpr int kWarpgroupRows = 64;  // queries of a consumer warpgroup

}  // namespace jax_natten::sm90
