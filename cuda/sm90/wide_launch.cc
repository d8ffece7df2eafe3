#include "wide_launch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "wide_instances.h"
#include "wide_params.h"

namespace jax_natten::sm90 {
namespace {

constexpr int kDims[] = {32, 64, 96, 128, 192, 256};

WideInstance find_instance(int dim, DType dtype, int rank, bool early_exponentials) {
  switch (dim) {
    case 32:
      return wide_d32(dtype, rank, early_exponentials);
    case 64:
      return wide_d64(dtype, rank, early_exponentials);
    case 96:
      return wide_d96(dtype, rank, early_exponentials);
    case 128:
      return wide_d128(dtype, rank, early_exponentials);
    case 192:
      return wide_d192(dtype, rank, early_exponentials);
    default:
      return wide_d256(dtype, rank, early_exponentials);
  }
}

int product(const int (&tile)[kMaxRank]) { return tile[0] * tile[1] * tile[2]; }

int64_t count_query_tiles(const FusedShape& shape, const TileSchedule& schedule) {
  int64_t tiles = shape.batch * shape.heads;
  for (const TiledAxis& axis : schedule.axes) tiles *= int64_t(axis.query_tiles) * axis.dilation;
  return tiles;
}

TileSchedule make_schedule(const FusedShape& shape, const WidePlan& plan) {
  TileSchedule schedule;
  for (int a = 0; a < kMaxRank; ++a) {
    schedule.axes[a] = TiledAxis(shape.neighborhood.axes[a], plan.query_tile[a], plan.query_part[a], plan.key_tile[a]);
  }
  schedule.by_heads = FastDivisor(shape.heads);
  schedule.by_group = FastDivisor(shape.group());
  schedule.tiles = int(std::min<int64_t>(count_query_tiles(shape, schedule), INT32_MAX));
  return schedule;
}

// The pair (factor, factor) in the problem's type.
uint32_t pair_of(DType dtype, bool minus_one) {
  if (!minus_one) return 0;
  return dtype == DType::kFloat16 ? 0xBC00BC00u : 0xBF80BF80u;
}

cudaError_t encode_maps(const FusedForwardParams& problem, const WidePlan& plan, WideParams& params) {
  const WideShape compiled = wide_shape(wide_compiled_dim(problem.dim));
  const TensorBox query_box = {compiled.chunk, {plan.query_part[0], plan.query_part[1], plan.query_part[2]}};
  const TensorBox key_box = {compiled.chunk, {plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]}};
  int uneven = 0;  // axes with longer and shorter dilation groups
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = problem.neighborhood.axes[a];
    const int rest = axis.length % axis.dilation;
    params.long_phases[a] = rest == 0 ? axis.dilation : rest;
    uneven |= int(rest != 0) << a;
  }
  for (int variant = 0; variant < kMaxMapVariants; ++variant) {
    if (variant & ~uneven) continue;  // no tile asks for it
    TensorMaps& maps = params.maps[variant];
    const auto encode = [&](CUtensorMap& map, const void* data, int heads, const TensorBox& box) {
      return encode_tensor_map(&map, problem, data, heads, problem.dim, box, variant, plan.layout);
    };
    for (const cudaError_t error : {encode(maps.query, problem.query, problem.heads, query_box),
                                    encode(maps.key, problem.key, problem.kv_heads, key_box),
                                    encode(maps.value, problem.value, problem.kv_heads, key_box),
                                    encode(maps.out, problem.out, problem.heads, query_box)}) {
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

// Lets the kernel have its shared memory, once per kernel and device.
cudaError_t configure(const WideInstance& instance, int device) {
  struct Configured {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<uint64_t> devices{0};
  };
  static Configured table[128];
  const void* kernel = reinterpret_cast<const void*>(instance.kernel);
  const auto set = [&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(instance.shared_bytes));
  };
  if (device >= 64) return set();
  for (Configured& entry : table) {
    const void* free_entry = nullptr;
    if (entry.kernel.load() != kernel && !entry.kernel.compare_exchange_strong(free_entry, kernel) &&
        free_entry != kernel) {
      continue;
    }
    if (entry.devices.load() >> device & 1) return cudaSuccess;
    const cudaError_t error = set();
    if (error == cudaSuccess) entry.devices.fetch_or(uint64_t(1) << device);
    return error;
  }
  return set();
}

}  // namespace

int wide_compiled_dim(int dim) {
  for (const int compiled : kDims) {
    if (dim <= compiled) return compiled;
  }
  return 0;
}

const char* why_not_wide(const FusedShape& shape) {
  if (shape.dtype != DType::kFloat16 && shape.dtype != DType::kBFloat16) return "takes float16 and bfloat16 only";
  if (shape.dim != shape.value_dim) return "needs values of the keys' head dimension";
  if (shape.dim > 256) return "takes head dimensions up to 256";
  if (shape.dim % 8 != 0) return "needs a head dimension that is a multiple of 8";
  if (shape.additional > 0) return "does not take additional keys yet";
  if (shape.has_bias()) return "does not take a relative position bias yet";
  if (shape.batch * shape.neighborhood.positions() * shape.heads > INT32_MAX) {
    return "takes up to 2^31 - 1 pairs of a query and a head";
  }
  return nullptr;
}

const char* why_not_wide_plan(const FusedShape& shape, const WidePlan& plan) {
  if (const char* reason = why_not_wide(shape)) return reason;
  const int compiled = wide_compiled_dim(shape.dim);
  for (int a = 0; a < kMaxRank; ++a) {
    if (plan.query_part[a] < 1 || plan.key_tile[a] < 1 || plan.query_tile[a] % plan.query_part[a] != 0) {
      return "query tiles must be divided into equal parts";
    }
    if (a < kMaxRank - shape.neighborhood.rank && plan.query_tile[a] * plan.key_tile[a] != 1) {
      return "axes that the problem does not have must have tiles of 1";
    }
  }
  if (product(plan.query_tile) != kWideGroups * product(plan.query_part)) return "query tiles must have two parts";
  if (product(plan.query_part) > kWideGroupRows) return "a warpgroup has at most 64 queries";
  if (product(plan.key_tile) > wide_shape(compiled).keys) return "key tiles have too many keys";
  if (plan.layout == TensorMapLayout::kHeadsInChannels) {
    for (const Axis& axis : shape.neighborhood.axes) {
      if (axis.dilation > 1) return "dilation needs the slab layout";
    }
    if (shape.dim != compiled) return "padded head dimensions need the slab layout";
  }
  if (count_query_tiles(shape, make_schedule(shape, plan)) > INT32_MAX) return "has too many tiles";
  return nullptr;
}

cudaError_t launch_wide(const FusedForwardParams& problem, const WidePlan& plan, cudaStream_t stream) {
  if (why_not_wide_plan(problem, plan) != nullptr) return cudaErrorInvalidValue;
  const Neighborhood& neighborhood = problem.neighborhood;
  if (problem.batch * neighborhood.positions() * problem.heads == 0) return cudaSuccess;

  const int compiled = wide_compiled_dim(problem.dim);
  WideParams params;
  params.schedule = make_schedule(problem, plan);
  params.query_address = slab_address(neighborhood, problem.heads, problem.dim, plan.layout);
  params.key_address = slab_address(neighborhood, problem.kv_heads, problem.dim, plan.layout);
  params.row_address = slab_address(neighborhood, problem.heads, problem.dim, TensorMapLayout::kSlabs);
  for (int a = 0; a < kMaxRank; ++a) {
    params.row_step[a] = params.row_address.per_phase[a] * neighborhood.axes[a].dilation;
  }
  if (const cudaError_t error = encode_maps(problem, plan, params); error != cudaSuccess) return error;
  params.mask_layout = KeyMaskLayout(plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  params.padded = product(plan.key_tile) < wide_shape(compiled).keys;
  params.lse = static_cast<float*>(problem.lse);
  // The kernel wants a positive scale: maxima of scores must stay maxima, and masked scores of -inf must not meet 0.
  constexpr double kLog2E = 1.4426950408889634;
  params.has_query_factor = !(problem.scale > 0);
  params.query_factor = pair_of(problem.dtype, problem.scale < 0);
  params.scale = float((problem.scale == 0 ? 1.0 : std::abs(problem.scale)) * kLog2E);

  const WideInstance instance = find_instance(compiled, problem.dtype, neighborhood.rank, plan.early_exponentials);
  int device = 0, processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (error = configure(instance, device); error != cudaSuccess) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(instance.kernel),
                          dim3(std::min(params.schedule.tiles, processors)), dim3(kWideThreads), arguments,
                          instance.shared_bytes, stream);
}

}  // namespace jax_natten::sm90
