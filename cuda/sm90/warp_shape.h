// What the "warp" kernel (warp_forward.cuh) is compiled for, and how much of a multiprocessor it takes. Plain code
// without CUDA.
#pragma once

#include "plan.h"

namespace jax_natten::sm90 {

constexpr int kWarpRows = 16;             // queries of a warp
constexpr int kSharedBytes = 227 * 1024;  // that a CTA may have
constexpr int kWarpMostStages = 4;        // of the query and the key rings
constexpr int kWarpTableBytes = 4352;     // of shared memory, for WarpTables
constexpr int kWarpExtensionBytes = 512;  // and, in extended variants, for WarpBiasOffsets
constexpr int kWarpMostListed = 112;      // keys of a list, in whole groups of 16

// Threads of the largest CTA, one warp of them the producer. The kernel may use all registers that this leaves.
constexpr int warp_most_threads(int dim, int list) {
  return dim == 32 ? (list == 56 ? 640 : 512) : list == 56 ? 512 : 384;
}
constexpr int kWarpMostWarps = warp_most_threads(32, 56) / 32 - 1;  // that compute, in any CTA
constexpr int warp_registers(int dim, int list) { return 65536 / warp_most_threads(dim, list) / 8 * 8; }

// What a kernel is compiled for. Plain: no axis has a stride or is causal.
enum class WarpCase {
  kGeneral,
  kSliced,    // plain
  kSingle,    // plain, and boxes hold all that a query tile sees
  kExtended,  // with additional keys and a relative position bias
};

// Shared memory of a CTA, in bytes from its beginning.
struct WarpLayout {
  int query_bytes, key_bytes;  // of a chunk of a box, in whole swizzle patterns
  int keys;                    // after the queries
  int staging;                 // of outputs
  int tables;                  // WarpTables
  int bytes;
};

// Lists of more keys take longer per query whether they are filled or not.
constexpr int kWarpLists[] = {56, 80, 104};
constexpr int kWarpPairList = 56;  // the one that boxes of two heads are compiled for

// The head dimension that the kernel for `dim` is compiled for.
constexpr int warp_compiled_dim(int dim) { return dim <= 32 ? 32 : 64; }

// What a warp gathers from a box: all that one part can see on an axis, or the whole box.
void find_warp_list(const FusedShape& shape, const Plan& plan, int (&list)[kMaxRank]);

// The axis along which boxes may be slices: the outermost of those that the problem's kernel is compiled for, which may
// be one that the problem lacks.
int warp_outer_axis(const FusedShape& shape);

// The case to compile a plan for.
WarpCase warp_case(const FusedShape& shape, const Plan& plan);

// The shortest compiled list that holds `keys`; 0: none.
int warp_compiled_list(int keys);

// Warps of a CTA that compute.
int count_warps(const Plan& plan);

WarpLayout make_warp_layout(const FusedShape& shape, const Plan& plan);

// CTAs that a multiprocessor holds at once. list: the compiled one, where it is known.
int warp_blocks_of_processor(const FusedShape& shape, const Plan& plan);
int warp_blocks_of_processor(const FusedShape& shape, const Plan& plan, int list);

}  // namespace jax_natten::sm90
