#include "plan.h"

#include <algorithm>

#include "../common/tile_model.h"
#include "middle_shape.h"
#include "warp_shape.h"
#include "wide_shape.h"

namespace jax_natten::sm90 {
namespace {

constexpr int kSharedBytesOfProcessor = 228 * 1024, kReservedBytes = 1024;

int64_t count_query_tiles(const FusedShape& shape, const TileSchedule& schedule) {
  int64_t tiles = shape.batch * schedule.by_heads.divisor;
  for (const TiledAxis& axis : schedule.axes) tiles *= int64_t(axis.query_tiles) * axis.dilation;
  return tiles;
}

// Why windows of a tile do not fit a PackedInterval.
const char* why_not_packed(const FusedShape& shape, const Plan& plan) {
  for (int a = 0; a < kMaxRank; ++a) {
    if (most_keys_of_queries(shape.neighborhood.axes[a], plan.query_tile[a]) > kMostPackedKeys) {
      return "query tiles see more than 32767 keys along an axis";
    }
  }
  return nullptr;
}

int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

std::array<int64_t, kPlanFields> encode_plan(const Plan& plan) {
  const int *q = plan.query_tile, *p = plan.query_part, *k = plan.key_tile;
  return {int(plan.structure), q[0],       q[1],       q[2], p[0], p[1], p[2], k[0], k[1], k[2],
          plan.heads,          plan.slots, plan.stages};
}

const char* decode_plan(const AskedTiles& tiles, Plan& plan) {
  const int64_t* const fields = tiles.fields;
  if (tiles.count != kPlanFields) return "tiles must have 13 numbers";
  if (fields[0] < 0 || fields[0] > int(Structure::kMiddle)) return "tiles have no such structure";
  for (size_t n = 1; n < tiles.count; ++n) {
    if (fields[n] < 1 || fields[n] > 4096) return "tiles must hold numbers from 1 to 4096";
  }
  plan.structure = Structure(fields[0]);
  for (int a = 0; a < kMaxRank; ++a) {
    plan.query_tile[a] = int(fields[1 + a]);
    plan.query_part[a] = int(fields[4 + a]);
    plan.key_tile[a] = int(fields[7 + a]);
  }
  plan.heads = int(fields[10]);
  plan.slots = int(fields[11]);
  plan.stages = int(fields[12]);
  return nullptr;
}

TileSchedule make_schedule(const FusedShape& shape, const Tiles& tiles, int heads) {
  TileSchedule schedule;
  for (int a = 0; a < kMaxRank; ++a) {
    schedule.axes[a] =
        TiledAxis(shape.neighborhood.axes[a], tiles.query_tile[a], tiles.query_part[a], tiles.key_tile[a]);
  }
  schedule.by_heads = FastDivisor(heads);
  schedule.by_group = FastDivisor(shape.group());
  schedule.tiles = int(std::min<int64_t>(count_query_tiles(shape, schedule), INT32_MAX));
  return schedule;
}

const char* why_not_layout(const FusedShape& shape) {
  if (shape.dtype != DType::kFloat16 && shape.dtype != DType::kBFloat16) return "takes float16 and bfloat16 only";
  if (shape.dim != shape.value_dim) return "needs values of the keys' head dimension";
  if (shape.dim > 256) return "takes head dimensions up to 256";
  if (shape.dim % 8 != 0) return "needs a head dimension that is a multiple of 8";
  if (shape.batch * shape.neighborhood.positions() * shape.heads > INT32_MAX) {
    return "takes up to 2^31 - 1 pairs of a query and a head";
  }
  return nullptr;
}

const char* why_not_any(const FusedShape& shape) {
  if (const char* reason = why_not_layout(shape)) return reason;
  if (shape.batch * shape.additional * shape.kv_heads > INT32_MAX) return "takes up to 2^31 - 1 additional keys";
  if (shape.has_bias()) {
    for (const Axis& axis : shape.neighborhood.axes) {
      if (axis.causal) return "takes no relative position bias on causal axes";
    }
    if (shape.neighborhood.bias_size() > INT32_MAX) return "takes bias tables of up to 2^31 - 1 entries per head";
  }
  return nullptr;
}

bool is_empty(const FusedShape& shape) {
  return shape.batch == 0 || shape.heads == 0 || shape.neighborhood.positions() == 0;
}

const char* why_not_tiles(const FusedShape& shape, const Tiles& tiles, int heads) {
  for (int a = 0; a < kMaxRank; ++a) {
    if (tiles.query_part[a] < 1 || tiles.key_tile[a] < 1 || tiles.query_tile[a] % tiles.query_part[a] != 0) {
      return "query tiles must be divided into equal parts";
    }
    if (a < kMaxRank - shape.neighborhood.rank && tiles.query_tile[a] * tiles.key_tile[a] != 1) {
      return "axes that the problem does not have must have tiles of 1";
    }
    if (tiles.query_tile[a] > kMostPositions || tiles.key_tile[a] > kMostPositions)
      return "tiles have at most 256 positions along an axis";
  }
  if (is_empty(shape)) return nullptr;
  if (count_query_tiles(shape, make_schedule(shape, tiles, heads)) > INT32_MAX) return "takes up to 2^31 - 1 tiles";
  return nullptr;
}

const char* why_not_tiles(const FusedShape& shape, const Plan& plan) {
  if (plan.heads != 1 && plan.heads != 2) return "boxes have one or two heads";
  if (plan.heads > 1 && !is_empty(shape) && (shape.heads % plan.heads != 0 || shape.group() != 1)) {
    return "boxes of two heads need an even number of heads, each with its own keys";
  }
  return why_not_tiles(shape, plan, shape.heads / plan.heads);
}

const char* why_not_wide(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any(shape)) return reason;
  if (const char* reason = why_not_tiles(shape, plan)) return reason;
  if (plan.heads != 1) return "boxes have one head";
  if (product(plan.query_tile) != kWideGroups * product(plan.query_part)) return "query tiles must have two parts";
  if (product(plan.query_part) > kWarpgroupRows) return "a warpgroup has at most 64 queries";
  if (product(plan.key_tile) > wide_shape(compiled_head_dim(shape.dim)).keys) return "key tiles have too many keys";
  return nullptr;
}

const char* why_not_middle(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any(shape)) return reason;
  if (is_extended(shape)) return "takes additional keys and a relative position bias in other structures only";
  if (shape.dim > kMiddleMostDim) return "takes head dimensions up to 128";
  if (const char* reason = why_not_tiles(shape, plan)) return reason;
  if (plan.heads != 1) return "boxes have one head";
  if (product(plan.query_tile) != product(plan.query_part)) return "query tiles must have one part";
  if (product(plan.query_part) > kWarpgroupRows) return "a warpgroup has at most 64 queries";
  if (middle_variant(compiled_head_dim(shape.dim), product(plan.key_tile)) == kMiddleVariants) {
    return "key tiles have too many keys";
  }
  return why_not_packed(shape, plan);
}

// ---- the warp kernel

void find_warp_list(const FusedShape& shape, const Plan& plan, int (&list)[kMaxRank]) {
  for (int a = 0; a < kMaxRank; ++a) {
    list[a] = std::min(plan.key_tile[a], most_keys_of_queries(shape.neighborhood.axes[a], plan.query_part[a]));
  }
}

int warp_outer_axis(const FusedShape& shape) {
  return kMaxRank - (is_extended(shape) ? kMaxRank : std::max(shape.neighborhood.rank, 2));
}

bool box_is_whole(const FusedShape& shape, const Plan& plan, int a) {
  return plan.key_tile[a] >= most_keys_of_queries(shape.neighborhood.axes[a], plan.query_tile[a]);
}

WarpCase warp_case(const FusedShape& shape, const Plan& plan) {
  if (is_extended(shape)) return WarpCase::kExtended;
  for (const Axis& axis : shape.neighborhood.axes) {
    if (axis.stride > 1 || axis.causal) return WarpCase::kGeneral;
  }
  if (shape.neighborhood.rank == 3) return plan.heads > 1 ? WarpCase::kGeneral : WarpCase::kSliced;
  return box_is_whole(shape, plan, 1) ? WarpCase::kSingle : WarpCase::kGeneral;
}

int warp_compiled_list(int keys) {
  for (const int compiled : kWarpLists) {
    if (keys <= compiled) return compiled;
  }
  return 0;
}

int count_warps(const Plan& plan) { return product(plan.query_tile) / product(plan.query_part) * plan.heads; }

WarpLayout make_warp_layout(const FusedShape& shape, const Plan& plan) {
  const int dim = warp_compiled_dim(shape.dim), row_bytes = 2 * dim * plan.heads;
  WarpLayout layout;
  layout.query_bytes = round_up(product(plan.query_tile) * row_bytes, 1024);
  layout.key_bytes = round_up(product(plan.key_tile) * row_bytes, 1024);
  layout.keys = plan.slots * layout.query_bytes;
  layout.staging = layout.keys + plan.stages * 2 * layout.key_bytes;
  layout.tables = layout.staging + count_warps(plan) * kWarpRows * 2 * dim;
  layout.bytes = layout.tables + kWarpTableBytes + (is_extended(shape) ? kWarpExtensionBytes : 0);
  return layout;
}

int warp_blocks_of_processor(const FusedShape& shape, const Plan& plan) {
  int list[kMaxRank];
  find_warp_list(shape, plan, list);
  return warp_blocks_of_processor(shape, plan, warp_compiled_list(product(list)));
}

int warp_blocks_of_processor(const FusedShape& shape, const Plan& plan, int list) {
  const int threads = 32 * (count_warps(plan) + 1);
  const int by_memory = kSharedBytesOfProcessor / (make_warp_layout(shape, plan).bytes + kReservedBytes);
  const int registers = warp_registers(warp_compiled_dim(shape.dim), list);
  const int by_registers = 65536 / (registers * threads);
  return std::max(std::min(by_memory, by_registers), 1);
}

const char* why_not_warp(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any(shape)) return reason;
  if (shape.dim > 64) return "takes head dimensions up to 64";
  if (const char* reason = why_not_tiles(shape, plan)) return reason;
  if (plan.heads > 1 && shape.dim != 32) return "boxes of two heads need a head dimension of 32";
  if (product(plan.key_tile) > kSharedBytes / 128) return "boxes do not fit into shared memory";
  if (product(plan.query_part) > kWarpRows) return "a warp has at most 16 queries";
  if (plan.slots < 1 || plan.slots > kWarpMostStages || plan.stages < 1 || plan.stages > kWarpMostStages) {
    return "rings have 1 to 4 stages";
  }
  if (const char* reason = why_not_packed(shape, plan)) return reason;
  int list[kMaxRank];
  find_warp_list(shape, plan, list);
  const int compiled = warp_compiled_list(product(list));
  if (compiled == 0) return "a warp's queries see too many keys of a box";
  if (32 * (count_warps(plan) + 1) > warp_most_threads(warp_compiled_dim(shape.dim), compiled)) {
    return "query tiles have more parts than a CTA has warps";
  }
  if (plan.heads > 1 && compiled != kWarpPairList) return "boxes of two heads take lists of up to 56 keys";
  if (plan.heads > 1 && is_extended(shape)) return "boxes of two heads take no additional keys and no bias";
  for (int a = warp_outer_axis(shape) + 1; a < kMaxRank; ++a) {
    if (!box_is_whole(shape, plan, a)) return "boxes must hold all keys that a query tile sees along the inner axes";
  }
  if (make_warp_layout(shape, plan).bytes > kSharedBytes) return "boxes do not fit into shared memory";
  return nullptr;
}

// ---- all

const char* why_not(const FusedShape& shape, const Plan& plan) {
  switch (plan.structure) {
    case Structure::kWide:
      return why_not_wide(shape, plan);
    case Structure::kWarp:
      return why_not_warp(shape, plan);
    default:
      return why_not_middle(shape, plan);
  }
}

}  // namespace jax_natten::sm90
