// The emulator finds what it claims to find: small kernels, right ones and ones with a fault each.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda/common/mma.h"
#include "cuda/common/ptx.h"
#include "cuda/common/wgmma.h"
#include "cuda_runtime.h"
#include "emulator.h"

namespace jax_natten {

int failures = 0;

void expect(bool good, const char* what) {
  std::printf("%-74s %s\n", what, good ? "ok" : "WRONG");
  failures += !good;
}

enum class Fault {
  kNone,
  kNoWait,
  kNoSyncwarp,
  kNoFence,
  kTooFewArrivals,
  kTooManyArrivals,
  kDivergence,
  kOutOfBounds,
  kMisaligned,
  kWriteBehind,
  kUnfinished,
  kNoProxyFence,
};

using Kernel = void (*)(Fault, float*);

// Runs under several seeds: "" if all were right, "wrong" if some result was, or what the emulator said.
std::string run(Kernel kernel, Fault fault, int threads, int results) {
  bool right = true;
  for (int seed = 0; seed < 40; ++seed) {
    emulator::Settings settings;
    settings.seed = uint64_t(seed);
    settings.quiet = true;
    emulator::configure(settings);
    emulator::Memory memory(4 * results);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = 16384;
    if (cudaLaunchKernelEx(&config, kernel, fault, memory.as<float>()) != cudaSuccess) return emulator::error();
    for (int i = 0; i < results; ++i) right = right && memory.as<float>()[i] == float(i);
  }
  return right ? "" : "wrong";
}

bool says(const std::string& error, const char* words) { return error.find(words) != std::string::npos; }

// ---- a ring of one slot: thread 32 writes, warp 0 reads and gives back

__global__ void ring(Fault fault, float* out) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  float* slot = reinterpret_cast<float*>(shared_memory);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared_memory + 1024);
  uint64_t *full = barriers, *empty = barriers + 1;
  constexpr int kItems = 8;
  if (threadIdx.x == 0) {
    ptx::barrier_init(full, 1);
    ptx::barrier_init(empty, fault == Fault::kTooFewArrivals ? 2 : 1);
  }
  __syncthreads();
  for (int i = 0; i < kItems; ++i) {
    if (threadIdx.x == 32) {
      ptx::barrier_wait(empty, (i + 1) % 2);
      *slot = float(i);
      ptx::barrier_arrive(full);
    } else if (threadIdx.x < 32) {
      if (fault != Fault::kNoWait) ptx::barrier_wait(full, i % 2);
      out[i * 32 + threadIdx.x] = *slot * 32 + threadIdx.x;
      if (fault != Fault::kNoSyncwarp) __syncwarp();
      if (threadIdx.x == 0) ptx::barrier_arrive(empty);
      if (threadIdx.x == 0 && fault == Fault::kTooManyArrivals) ptx::barrier_arrive(empty);
    }
  }
}

// ---- cp.async

__global__ void copy(Fault fault, float* out) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  __shared__ static float source[64];
  source[threadIdx.x] = float(threadIdx.x);
  const uint32_t to = ptx::shared_address(shared_memory + 4 * threadIdx.x);
  ptx::copy_async<4>(to, &source[threadIdx.x], threadIdx.x != 0);
  ptx::copy_async_commit();
  if (fault != Fault::kNoWait) ptx::copy_async_wait<0>();
  __syncthreads();
  const int other = threadIdx.x ^ 33;
  out[other] = reinterpret_cast<float*>(shared_memory)[other];
}

// ---- wgmma: A = (row == k) for k < 16, B[k][n] = 16 n + k; D[row][n] = 16 n + row

template <typename T>
__global__ void product(Fault fault, float* out) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  constexpr int kColumns = 32, kSpan = 64, kAtom = 8 * kSpan;
  T* b = reinterpret_cast<T*>(shared_memory);
  for (int i = threadIdx.x; i < 16 * kColumns; i += 128) {
    const int n = i / 16, k = i % 16, address = n * kSpan + 2 * k;
    b[(address ^ (address >> 3 & 0x30)) / 2] = T(float(16 * n + k) / 32);
  }
  T* a = reinterpret_cast<T*>(shared_memory + 8192);
  for (int i = threadIdx.x; i < 64 * 16; i += 128) {
    const int row = i / 16, k = i % 16, address = row * kSpan + 2 * k;
    a[(address ^ (address >> 3 & 0x30)) / 2] = T(row == k ? 32.f : 0.f);
  }
  ptx::async_proxy_fence();
  __syncthreads();
  float d[kColumns / 2];
  if (fault != Fault::kNoFence) ptx::wgmma_fence();
  const auto describe = [&](const void* at) {
    return ptx::matrix_descriptor(ptx::shared_address(at), 16, kAtom, ptx::Swizzle::k64Bytes);
  };
  ptx::Wgmma<T, kColumns>::shared(d, describe(a), describe(b), false);
  ptx::wgmma_commit();
  const auto write = [&] {
    for (int e = 0; e < kColumns / 2; ++e) {
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 % 2 * 8;
      const int n = e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2;
      if (row < 16 && n < 16) out[16 * n + row] = d[e];  // up to 255: exact in bfloat16
    }
  };
  if (fault == Fault::kNoWait) write();
  if (fault != Fault::kUnfinished) ptx::wgmma_wait<0>();
  if (fault != Fault::kNoWait) write();
}

// ---- a TMA store of what stmatrix wrote

__global__ void store_box(Fault fault, float* out) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const int lane = threadIdx.x;
  CUtensorMap map;  // 16-bit elements: 8 rows of 32
  const cuuint64_t size[5] = {32, 8, 1, 1, 1}, stride[4] = {64, 512, 512, 512};
  const cuuint32_t box[5] = {32, 8, 1, 1, 1}, one[5] = {1, 1, 1, 1, 1};
  cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, out, size, stride, box, one,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // Matrix m holds elements 8 m .. 8 m + 7 of each row; two elements are a float of the result.
  uint32_t values[4];
  for (int m = 0; m < 4; ++m) {
    const float x = float(lane / 4 * 16 + 4 * m + lane % 4);
    memcpy(&values[m], &x, 4);
  }
  const uint32_t place = lane % 8 * 64 + lane / 8 * 16;
  ptx::store_matrix_x4(ptx::shared_address(shared_memory) + (place ^ (place >> 3 & 0x30)), values[0], values[1],
                       values[2], values[3]);
  if (fault != Fault::kNoProxyFence) ptx::async_proxy_fence();
  if (fault != Fault::kNoSyncwarp) __syncwarp();
  if (lane == 0) {
    ptx::tma_store(&map, ptx::shared_address(shared_memory), 0, 0, 0, 0, 0);
    ptx::tma_store_commit();
    if (fault != Fault::kNoWait) ptx::tma_store_wait_read();
  }
}

// ---- mma: A and B through ldmatrix, D[m][n] = 8 m + n

__global__ void warp_product(Fault fault, float* out) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto* a = reinterpret_cast<__half*>(shared_memory);  // 16 x 16: 1 in column 0, the row in column 9
  auto* b = a + 256;                                   // 16 x 16: the column in row 0, 8 in row 9
  for (int i = threadIdx.x; i < 256; i += 32) {
    const int row = i / 16, column = i % 16;
    a[i] = __half(column == 0 ? 1.f : column == 9 ? float(row) : 0.f);
    b[i] = __half(row == 0 ? float(column) : row == 9 ? 8.f : 0.f);
  }
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[4];
  const auto address = [&](const __half* matrix) {
    return ptx::shared_address(matrix + lane % 16 * 16 + lane / 16 * 8);
  };
  const uint32_t offset = fault == Fault::kOutOfBounds ? 16384 : fault == Fault::kMisaligned ? 4 : 0;
  ptx::load_matrix_x4(fa, address(a) + offset);
  ptx::load_matrix_x4_transposed(fb, address(b));
  if (fault == Fault::kDivergence && lane == 5) __syncwarp();
  if (fault == Fault::kWriteBehind) shared_memory[16384 + lane] = 1;
  float d[4];
  ptx::mma_from_zero<__half>(d, fa, fb[0], fb[1]);
  for (int e = 0; e < 4; ++e) out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

// ---- votes and shuffles

__global__ void exchange(Fault fault, float* out) {
  const int lane = threadIdx.x;
  int sum = lane;
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  const int up = __shfl_up_sync(~0u, lane, 1), first = __shfl_sync(~0u, lane, 8, 8);
  const bool good = sum == 496 && up == (lane ? lane - 1 : 0) && first == lane / 8 * 8 &&
                    __ballot_sync(~0u, lane % 2) == 0xAAAAAAAA && __any_sync(~0u, lane == 3) && !__all_sync(~0u, lane);
  out[lane] = good ? float(lane) : -1;
  if (fault == Fault::kTooFewArrivals && lane != 0) ptx::named_barrier_sync(1, 32);
}

void test_numbers() {
  bool good = true;
  for (int bits = 0; bits < 65536; ++bits) {
    const float half = emulator::half_to_float(uint16_t(bits)), wide = emulator::bfloat16_to_float(uint16_t(bits));
    good = good && (std::isnan(half) || emulator::float_to_half(half) == bits);
    good = good && (std::isnan(wide) || emulator::float_to_bfloat16(wide) == bits);
  }
  expect(good, "16-bit numbers survive conversion to float and back");
  expect(emulator::float_to_half(2049) == emulator::float_to_half(2048) &&
             emulator::float_to_half(2051) == emulator::float_to_half(2052) &&
             emulator::float_to_half(65519.f) == 0x7BFF && emulator::float_to_half(65520.f) == 0x7C00 &&
             emulator::float_to_bfloat16(257) == emulator::float_to_bfloat16(256) &&
             emulator::float_to_bfloat16(259) == emulator::float_to_bfloat16(260),
         "rounding goes to the nearest number, ties to even");
}

int main() {
  test_numbers();
  expect(run(ring, Fault::kNone, 64, 256).empty(), "a ring hands every item to every lane");
  expect(!run(ring, Fault::kNoWait, 64, 256).empty(), "reading before an mbarrier's phase is found");
  expect(!run(ring, Fault::kNoSyncwarp, 64, 256).empty(), "a slot released while other lanes read it is found");
  expect(says(run(ring, Fault::kTooFewArrivals, 64, 256), "deadlock"), "a deadlock at an mbarrier is found");
  expect(!run(ring, Fault::kTooManyArrivals, 64, 256).empty(), "a second arrival is found");
  expect(says(run(exchange, Fault::kTooFewArrivals, 32, 32), "named barrier 1 (31 of 32 threads)"),
         "a deadlock at a named barrier is found");
  expect(run(exchange, Fault::kNone, 32, 32).empty(), "shuffles and votes");
  expect(run(copy, Fault::kNone, 64, 64).empty(), "cp.async copies, and fills with zeros");
  expect(run(copy, Fault::kNoWait, 64, 64) == "wrong", "reading before cp.async has landed is found");
  expect(run(product<__half>, Fault::kNone, 128, 256).empty(), "wgmma multiplies (float16)");
  expect(run(product<__nv_bfloat16>, Fault::kNone, 128, 256).empty(), "wgmma multiplies (bfloat16)");
  expect(run(product<__half>, Fault::kNoWait, 128, 256) == "wrong", "reading accumulators in flight is found");
  expect(says(run(product<__half>, Fault::kNoFence, 128, 256), "wgmma_fence"), "a missing wgmma_fence is found");
  expect(says(run(product<__half>, Fault::kUnfinished, 128, 256), "waited"), "a wgmma that nobody awaits is found");
  expect(run(store_box, Fault::kNone, 32, 128).empty(), "stmatrix and a TMA store");
  expect(says(run(store_box, Fault::kNoProxyFence, 32, 128), "async_proxy_fence"), "a missing proxy fence is found");
  expect(!run(store_box, Fault::kNoSyncwarp, 32, 128).empty(), "a store before all lanes have written is found");
  expect(says(run(store_box, Fault::kNoWait, 32, 128), "TMA store"), "shared memory left before a store is found");
  expect(run(warp_product, Fault::kNone, 32, 128).empty(), "ldmatrix and mma multiply");
  expect(says(run(warp_product, Fault::kDivergence, 32, 128), "diverge"), "diverging lanes are found");
  expect(says(run(warp_product, Fault::kOutOfBounds, 32, 128), "outside of shared memory"), "bounds are checked");
  expect(says(run(warp_product, Fault::kMisaligned, 32, 128), "not a multiple of 16"), "alignment is checked");
  expect(says(run(warp_product, Fault::kWriteBehind, 32, 128), "behind its end"), "writes behind shared memory");
  return failures != 0;
}

}  // namespace jax_natten

int main() { return jax_natten::main(); }
