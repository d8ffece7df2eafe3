#include "extension_setup.h"

namespace jax_natten::sm90 {

cudaError_t set_up_additional(const FusedShape& shape, const void* keys, const void* values, const TensorBox& rows,
                              int box, KeyExtension& extension) {
  extension.additional = shape.additional;
  extension.box = box;
  extension.per_batch = shape.additional * shape.kv_heads;
  if (shape.additional == 0) return cudaSuccess;
  const cudaError_t error = encode_additional_map(&extension.key, shape, keys, rows, box);
  return error != cudaSuccess ? error : encode_additional_map(&extension.value, shape, values, rows, box);
}

void set_up_bias(const FusedShape& shape, const void* bias, KeyExtension& extension, float& scale) {
  extension.bias = static_cast<const float*>(bias);
  extension.heads = shape.heads;
  extension.by_table = FastDivisor(int(shape.batch / shape.bias_batch));
  extension.bias_size = shape.neighborhood.bias_size();
  int step = 1, center = 0;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int window = shape.neighborhood.axes[a].window;
    extension.bias_step[a] = step;
    center += (window - 1) * step;
    step *= 2 * window - 1;
  }
  extension.bias_center = center;
  extension.score_scale = scale;
  scale = 1;
}

}  // namespace jax_natten::sm90
