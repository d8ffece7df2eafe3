// What the kernels of the backward compute and are compiled for. Plain code without CUDA.
//
//   S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)    delta = rowsum(out dO) - d_lse
//   dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
//
// Two passes, neither with atomic operations. The *query pass* keeps tiles of queries in shared memory and has the keys
// that they see stream past: delta, dQ. The *key pass* keeps tiles of keys and has the queries that see them stream
// past: dK, dV. Each sees a matrix of scores whose *rows* are what stays and whose *columns* are what streams; the key
// pass computes all matrices transposed.
#pragma once

#include "../common/tiling.h"

namespace jax_natten::sm90 {

// Rows and columns are pairs of tensors: the products of the first give scores, those of the second their gradients.
//   query pass: rows are queries and d_out, columns keys and values
//   key pass:   rows are keys and values,   columns queries and d_out
// Results take the places of rows: of the first dQ or dK, of the second dV.
enum Operand { kScores, kGradients };
constexpr int kOperands = 2;

constexpr Walk kQueryPass = Walk::kKeysOfQueries, kKeyPass = Walk::kQueriesOfKeys;

// Compile-time shape of a pass for a head dimension; smaller head dimensions are padded with zeros by the TMA.
struct PassShape {
  int dim;
  int columns;    // of a column tile
  int stages;     // of the ring of column tiles
  int row_slots;  // row tiles in shared memory
  int parts;      // of a row tile: 64 rows each
  int groups;     // consumer warpgroups. As many as parts, or two for one part: one for dV, one for dK.
  int residency;  // CTAs on a multiprocessor
  int registers;  // of a consumer thread; producers get what remains of those that all had at launch
  int chunk;      // channels of a shared-memory row, which is one swizzle span of 128 or 64 bytes

  constexpr int chunks() const { return dim / chunk; }
  constexpr int row_bytes() const { return 2 * chunk; }
  constexpr int threads() const { return 128 * (groups + 1); }
  constexpr int launch_registers() const { return 64 * 1024 / (threads() * residency) / 8 * 8; }
  constexpr int producer_registers() const { return (groups + 1) * launch_registers() - groups * registers; }
};

// For large windows; `small` for small ones: there it counts how many tiles are in flight.
constexpr PassShape pass_shape(Walk pass, int dim, bool small) {
  if (pass == kQueryPass) {
    if (small) return dim == 32 ? PassShape{32, 64, 3, 2, 1, 1, 3, 128, 32} : PassShape{64, 64, 2, 2, 1, 1, 3, 128, 64};
    return dim == 32    ? PassShape{32, 128, 4, 2, 2, 2, 1, 232, 32}
           : dim == 64  ? PassShape{64, 128, 4, 2, 2, 2, 1, 232, 64}
           : dim == 96  ? PassShape{96, 128, 3, 1, 2, 2, 1, 232, 32}
           : dim == 128 ? PassShape{128, 128, 2, 1, 2, 2, 1, 240, 64}
           : dim == 192 ? PassShape{192, 80, 2, 1, 2, 2, 1, 232, 64}
                        : PassShape{256, 32, 2, 1, 2, 2, 1, 232, 64};
  }
  if (small) return dim == 32 ? PassShape{32, 64, 4, 2, 1, 1, 2, 216, 32} : PassShape{64, 64, 3, 2, 1, 1, 2, 216, 64};
  return dim == 32    ? PassShape{32, 112, 4, 2, 2, 2, 1, 232, 32}
         : dim == 64  ? PassShape{64, 112, 3, 2, 2, 2, 1, 232, 64}
         : dim == 96  ? PassShape{96, 64, 4, 1, 2, 2, 1, 232, 32}
         : dim == 128 ? PassShape{128, 64, 4, 1, 2, 2, 1, 240, 64}
         : dim == 192 ? PassShape{192, 64, 3, 1, 1, 2, 1, 232, 64}
                      : PassShape{256, 64, 2, 1, 1, 2, 1, 232, 64};
}

constexpr bool has_small_shape(int dim) { return dim <= 64; }

constexpr int kPartRows = 64;  // rows of a part

}  // namespace jax_natten::sm90
