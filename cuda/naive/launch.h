// Choosing a kernel's instantiation and launching it.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../common/params.h"
#include "dtype.h"
#include "geometry.h"
#include "rows.cuh"

namespace jax_natten::naive {

template <typename T>
struct TypeOf {
  using Type = T;
};

// Whether rows of these sizes at these addresses can be read in packs of 16 bytes.
inline bool rows_aligned(int64_t element_bytes, std::initializer_list<int64_t> sizes,
                         std::initializer_list<const void*> bases) {
  constexpr int kPack = 16;
  return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size * element_bytes % kPack == 0; }) &&
         std::all_of(bases.begin(), bases.end(),
                     [](const void* base) { return reinterpret_cast<uintptr_t>(base) % kPack == 0; });
}

// Few packs per lane would waste shuffles, many would waste registers: two, spread over as few lanes as hold the row.
// Rows of up to 64 bytes take one, since four lanes fill a memory sector. Long rows, double precision and rows that are
// not aligned are rare enough to share a layout.
template <typename T, typename F>
cudaError_t with_layout_of(int64_t size, bool aligned, F&& launch) {
  constexpr int kPack = 16 / sizeof(T);
  if (!aligned) return launch(TypeOf<T>(), Layout<1, 32, 2, false>());
  if constexpr (!std::is_same_v<T, double>) {
    if (size <= 4 * kPack) return launch(TypeOf<T>(), Layout<kPack, 4, 1, true>());
    if (size <= 8 * kPack) return launch(TypeOf<T>(), Layout<kPack, 4, 2, true>());
    if (size <= 16 * kPack) return launch(TypeOf<T>(), Layout<kPack, 8, 2, true>());
    if constexpr (sizeof(T) == 4) {  // rows of 128, as 16-bit types have above
      if (size <= 32 * kPack) return launch(TypeOf<T>(), Layout<kPack, 16, 2, true>());
    }
  }
  return launch(TypeOf<T>(), Layout<kPack, 32, sizeof(T) == 8 ? 2 : 4, false>());
}

// Calls launch(TypeOf<T>, Layout) for a dtype and the longest row that the kernel holds.
template <typename F>
cudaError_t with_layout(DType dtype, int64_t size, bool aligned, F&& launch) {
  switch (dtype) {
    case DType::kFloat16:
      return with_layout_of<__half>(size, aligned, launch);
    case DType::kBFloat16:
      return with_layout_of<__nv_bfloat16>(size, aligned, launch);
    case DType::kFloat32:
      return with_layout_of<float>(size, aligned, launch);
    case DType::kFloat64:
      return with_layout_of<double>(size, aligned, launch);
  }
  return cudaErrorInvalidValue;
}

// Launches kernel(arguments.., first_block) over any number of blocks: a grid holds fewer than 2^31.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream,
                          const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = int64_t(1) << 30;
  for (int64_t first = 0; first < blocks; first += kMaxBlocks) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::min(blocks - first, kMaxBlocks)));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    if (cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments..., first)) return error;
  }
  return cudaSuccess;
}

inline int64_t blocks_for(int64_t items, int64_t items_per_block) {
  return (items + items_per_block - 1) / items_per_block;
}

}  // namespace jax_natten::naive
