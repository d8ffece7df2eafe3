// The parts of CUDA's runtime and driver that the project's host code calls.
#include <cstring>
#include <map>

#include "cuda.h"
#include "cuda_runtime_api.h"
#include "emulator.h"
#include "tensor_map.h"

namespace {

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

std::map<const void*, size_t>& allowed_shared_bytes() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const auto allowed = allowed_shared_bytes().find(kernel);
  if (shared_bytes > (allowed == allowed_shared_bytes().end() ? kSharedBytesWithoutAsking : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  return cudaError_t(emulator::launch_untyped(kernel, arguments[0], grid, block, shared_bytes));
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > emulator::kMostSharedBytes) return cudaErrorInvalidValue;
  allowed_shared_bytes()[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::settings().processors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::settings().capability[0];
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulator::settings().capability[1];
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulator::kMostSharedBytes + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::kMostSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::error().c_str() : cudaGetErrorName(error);
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unknown error";
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  constexpr int kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2}, kSpans[] = {0, 32, 64, 128};
  if (rank < 1 || rank > 5 || unsigned(type) > 9 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  emulator::TensorMap encoded = {};
  encoded.magic = emulator::TensorMap::kMagic;
  encoded.rank = uint8_t(rank);
  encoded.element_bytes = uint8_t(kBytes[type]);
  encoded.swizzle = uint8_t(kSpans[swizzle]);
  encoded.data = static_cast<uint8_t*>(data);
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (size[d] < 1 || size[d] > (cuuint64_t(1) << 32) || box[d] < 1 || box[d] > 256 || element_stride[d] < 1 ||
        element_stride[d] > 8) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (d > 0 && (stride[d - 1] % 16 != 0 || stride[d - 1] >= (cuuint64_t(1) << 40))) return CUDA_ERROR_INVALID_VALUE;
    encoded.size[d] = uint32_t(size[d] - 1);
    encoded.box[d] = uint16_t(box[d]);
    encoded.element_stride[d] = d == 0 ? 1 : uint8_t(element_stride[d]);
    if (d > 0) encoded.stride[d - 1] = stride[d - 1];
  }
  const int row_bytes = int(box[0]) * encoded.element_bytes;
  // The hardware also takes rows shorter than the swizzle span; their layout is not modelled.
  if (row_bytes % 16 != 0 || (encoded.swizzle != 0 && row_bytes != encoded.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}
