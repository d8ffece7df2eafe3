#include "tensor_map.h"

namespace jax_natten::sm90 {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Found through the runtime, so that nothing links libcuda.
EncodeTiled find_encoder() {
  static const EncodeTiled encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                         : nullptr;
  }();
  return encoder;
}

constexpr cuuint64_t kElementBytes = 2;

// Rows of a box are swizzle spans.
cudaError_t encode(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&size)[5],
                   const cuuint64_t (&stride)[4], const cuuint32_t (&box)[5]) {
  const EncodeTiled encoder = find_encoder();
  if (encoder == nullptr) return cudaErrorNotSupported;
  constexpr cuuint32_t kElementStride[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encoder(map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
              const_cast<void*>(data), size, stride, box, kElementStride, CU_TENSOR_MAP_INTERLEAVE_NONE,
              box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

SlabAddress slab_address(const Neighborhood& neighborhood, int heads) {
  const Axis* axes = neighborhood.axes;
  SlabAddress address;
  address.per_phase[2] = heads;
  address.per_phase[1] = axes[2].length * address.per_phase[2];
  address.per_phase[0] = axes[1].length * address.per_phase[1];
  address.per_batch = axes[0].length * address.per_phase[0];
  return address;
}

cudaError_t encode_tensor_map(CUtensorMap* map, const FusedShape& shape, const void* data, int heads,
                              const TensorBox& box, int short_groups) {
  const Axis* axes = shape.neighborhood.axes;
  cuuint64_t size[5], stride[4];
  cuuint32_t extent[5];
  size[0] = cuuint64_t(shape.dim) * box.heads;
  extent[0] = box.channels;
  cuuint64_t position = kElementBytes * heads * shape.dim;  // bytes from one position to the next on the axis
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int d = kMaxRank - a;  // dimension of the map
    size[d] = group_length(axes[a], short_groups >> a & 1 ? axes[a].dilation - 1 : 0);
    stride[d - 1] = position * axes[a].dilation;
    extent[d] = box.queries[a];
    position *= axes[a].length;
  }
  size[4] = cuuint64_t(shape.batch) * shape.neighborhood.positions() * heads;
  stride[3] = kElementBytes * shape.dim;
  extent[4] = 1;
  return encode(map, shape.dtype, data, size, stride, extent);
}

cudaError_t encode_additional_map(CUtensorMap* map, const FusedShape& shape, const void* data, const TensorBox& box,
                                  int keys) {
  const cuuint64_t row = kElementBytes * shape.dim;
  const cuuint64_t size[5] = {cuuint64_t(shape.dim) * box.heads, cuuint64_t(shape.additional), 1, 1,
                              cuuint64_t(shape.batch) * shape.additional * shape.kv_heads};
  const cuuint64_t stride[4] = {row * shape.kv_heads, row, row, row};
  const cuuint32_t extent[5] = {cuuint32_t(box.channels), cuuint32_t(keys), 1, 1, 1};
  return encode(map, shape.dtype, data, size, stride, extent);
}

}  // namespace jax_natten::sm90
