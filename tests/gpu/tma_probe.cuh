// Probes hardware behaviour of tensor maps that the sm_90 kernels rely on and the manuals do not spell out: a slab
// dimension that overlaps the others, boxes that overhang the head dimension or a dilation group, clipped stores.
#pragma once

#include <cstdio>
#include <vector>

#include "../../cuda/common/ptx.h"
#include "../../cuda/sm90/tensor_map.h"
#include "device_reference.cuh"

namespace jax_natten::driver {

struct ProbeArguments {
  CUtensorMap load, store;
  int x[kMaxRank], slab, channel, rows, row_bytes;
};

__global__ void copy_box(const __grid_constant__ ProbeArguments arguments, uint8_t* loaded) {
  extern __shared__ __align__(1024) uint8_t box[];
  uint64_t& barrier = *reinterpret_cast<uint64_t*>(box + 32768);
  if (threadIdx.x == 0) {
    if (ptx::shared_address(box) % 1024) printf("dynamic shared memory is not aligned\n");
    ptx::barrier_init(&barrier, 1);
    ptx::barrier_init_fence();
    const int* x = arguments.x;
    ptx::barrier_arrive_expecting(&barrier, arguments.rows * arguments.row_bytes);
    ptx::tma_load(ptx::shared_address(box), &arguments.load, &barrier, arguments.channel, x[2], x[1], x[0],
                  arguments.slab, ptx::CachePolicy::kNormal);
    ptx::barrier_wait(&barrier, 0);
    ptx::tma_store(&arguments.store, ptx::shared_address(box), arguments.channel, x[2], x[1], x[0], arguments.slab);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < arguments.rows * arguments.row_bytes; i += blockDim.x) loaded[i] = box[i];
}

inline int run_probe() {
  struct Case {
    const char* name;
    int dim, dilation[kMaxRank], box[kMaxRank], phase[kMaxRank], begin[kMaxRank];
  };
  const Case cases[] = {
      {"plain", 64, {1, 1, 1}, {2, 3, 4}, {0, 0, 0}, {1, 2, 3}},
      {"overhang", 64, {1, 1, 1}, {2, 4, 8}, {0, 0, 0}, {5, 9, 9}},
      {"dilated", 64, {2, 3, 2}, {2, 2, 3}, {1, 2, 0}, {0, 1, 1}},
      {"dilated, short groups, overhang", 64, {4, 3, 2}, {2, 4, 8}, {3, 2, 1}, {0, 1, 2}},
      {"padded head dimension", 40, {1, 1, 1}, {2, 3, 4}, {0, 0, 0}, {1, 2, 3}},
      {"padded, dilated, overhang", 24, {4, 3, 2}, {2, 4, 8}, {3, 2, 1}, {0, 1, 2}},
      {"second chunk padded", 88, {1, 1, 1}, {1, 3, 4}, {0, 0, 0}, {1, 2, 3}},
  };
  int failures = 0;
  for (const Case& c : cases) {
    FusedShape shape;
    shape.dtype = DType::kBFloat16;
    shape.batch = 2;
    shape.heads = shape.kv_heads = 3;
    shape.dim = c.dim;
    shape.neighborhood.rank = 3;
    const int length[kMaxRank] = {7, 11, 13};
    int short_groups = 0;
    for (int a = 0; a < kMaxRank; ++a) {
      shape.neighborhood.axes[a] = Axis{length[a], 1, 1, c.dilation[a], false};
      const int rest = length[a] % c.dilation[a];
      short_groups |= int(rest != 0 && c.phase[a] >= rest) << a;
    }
    const int64_t count = 2 * shape.neighborhood.positions() * 3 * c.dim;
    std::vector<uint16_t> host(count), expected_store(count, 0), stored(count);
    for (int64_t i = 0; i < count; ++i) host[i] = uint16_t(i * 40503 >> 3 | 1);
    uint16_t *data, *target;
    uint8_t* loaded;
    CHECK_CUDA(cudaMalloc(&data, 2 * count));
    CHECK_CUDA(cudaMalloc(&target, 2 * count));
    CHECK_CUDA(cudaMalloc(&loaded, 65536));
    CHECK_CUDA(cudaMemcpy(data, host.data(), 2 * count, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemset(target, 0, 2 * count));
    const int chunk = c.dim > 32 ? 64 : 32, batch = 1, head = 2;
    const sm90::TensorBox box = {chunk, 1, {c.box[0], c.box[1], c.box[2]}};
    ProbeArguments arguments;
    const cudaError_t encoded[] = {sm90::encode_tensor_map(&arguments.load, shape, data, 3, box, short_groups),
                                   sm90::encode_tensor_map(&arguments.store, shape, target, 3, box, short_groups)};
    const sm90::SlabAddress address = sm90::slab_address(shape.neighborhood, 3);
    QueryTile tile = {};
    tile.batch = batch;
    for (int a = 0; a < kMaxRank; ++a) {
      tile.phase[a] = c.phase[a];
      arguments.x[a] = c.begin[a];
    }
    arguments.slab = address.slab<3>(tile, head);
    arguments.channel = c.dim > 64 ? 64 : 0;
    arguments.rows = c.box[0] * c.box[1] * c.box[2];
    arguments.row_bytes = 2 * chunk;
    copy_box<<<1, 128, 32768 + 64>>>(arguments, loaded);
    const cudaError_t ran = cudaDeviceSynchronize();
    int wrong = 0;
    std::vector<uint8_t> bytes(arguments.rows * arguments.row_bytes);
    CHECK_CUDA(cudaMemcpy(bytes.data(), loaded, bytes.size(), cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(stored.data(), target, 2 * count, cudaMemcpyDeviceToHost));
    for (int row = 0; row < arguments.rows; ++row) {
      const int in_box[kMaxRank] = {row / (c.box[2] * c.box[1]), row / c.box[2] % c.box[1], row % c.box[2]};
      int64_t position = batch;
      bool inside = true;
      for (int a = 0; a < kMaxRank; ++a) {
        const int x = (c.begin[a] + in_box[a]) * c.dilation[a] + c.phase[a];
        inside = inside && x < length[a];
        position = position * length[a] + x;
      }
      for (int e = 0; e < chunk; ++e) {
        const int channel = arguments.channel + e;
        const int64_t at = (position * 3 + head) * c.dim + channel;
        const bool real = inside && channel < c.dim;
        const int swizzled = (e / 8 ^ (chunk == 64 ? row % 8 : row / 2 % 4)) * 16 + e % 8 * 2;
        const uint8_t* at_byte = &bytes[row * arguments.row_bytes + swizzled];
        const uint16_t got = uint16_t(at_byte[0] | at_byte[1] << 8);
        wrong += got != (real ? host[at] : 0);
        if (real) expected_store[at] = host[at];
      }
    }
    int wrong_stores = 0;
    for (int64_t i = 0; i < count; ++i) wrong_stores += stored[i] != expected_store[i];
    std::printf("probe %-34s encode %d %d, run %s, wrong loads %d, wrong stores %d\n", c.name, int(encoded[0]),
                int(encoded[1]), cudaGetErrorString(ran), wrong, wrong_stores);
    failures += encoded[0] || encoded[1] || ran || wrong || wrong_stores;
    cudaFree(data);
    cudaFree(target);
    cudaFree(loaded);
  }
  return failures != 0;
}

}  // namespace jax_natten::driver
