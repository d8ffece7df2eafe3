// The rows of a box, in and out: the positions of tensors [batch, positions, heads, dim] that the box covers.
// Prefetches, because one head's rows are far apart in memory.
#pragma once

#include "boxes.h"
#include "storage.h"
#include "sweep.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// A tensor [batch, positions, heads, dim]; Data is const void or void.
template <typename Data>
struct TensorOf {
  DType dtype;
  Data* data;
  int64_t positions;
  int heads, dim;

  JAX_NATTEN_INLINE int64_t offset(int64_t batch, int64_t position, int head) const {
    return ((batch * positions + position) * heads + head) * dim;
  }
};
using Tensor = TensorOf<const void>;
using Result = TensorOf<void>;

// Positions ahead that are prefetched.
constexpr int kPrefetched = 16;

// Loads the rows of a line, times `factor`: for each position `heads` rows of dim elements, one after the other.
template <typename Real>
void load_line(const Tensor& tensor, const Neighborhood& neighborhood, const Box& box, const Line& line, int64_t batch,
               int first_head, int heads, Real* rows, Real factor = 1) {
  const int64_t stride = int64_t(tensor.heads) * tensor.dim * neighborhood.axes[2].dilation;
  const int64_t first = tensor.offset(batch, position(neighborhood, box, line.i0, line.i1, box.begin[2]), first_head);
  const int64_t next =
      tensor.offset(batch, position(neighborhood, box, line.i0, line.i1 + 1, box.begin[2]), first_head);
  const int count = box.extent(2), elements = heads * tensor.dim;
  with_storage<Real>(tensor.dtype, [&](auto element) {
    const decltype(element)* from = static_cast<const decltype(element)*>(tensor.data);
    for (int i = 0; i < count; ++i) {
      const int ahead = i + kPrefetched;
      prefetch(from + (ahead < count ? first + ahead * stride : next + (ahead - count) * stride), elements);
      load_row(from + first + i * stride, elements, rows + int64_t(i) * elements, factor);
    }
  });
}

// Stores all rows of a box, which are `width` apart and in the order of positions, then heads, each times
// factor(row).
template <typename Real, typename Factor>
void store_box(const Result& tensor, const Neighborhood& neighborhood, const Box& box, int64_t batch, int first_head,
               int heads, const Real* rows, int width, Factor factor) {
  const int64_t stride = int64_t(tensor.heads) * tensor.dim * neighborhood.axes[2].dilation;
  with_storage<Real>(tensor.dtype, [&](auto element) {
    int64_t row = 0;
    for (int i0 = box.begin[0]; i0 < box.end[0]; ++i0) {
      for (int i1 = box.begin[1]; i1 < box.end[1]; ++i1) {
        decltype(element)* to = static_cast<decltype(element)*>(tensor.data) +
                                tensor.offset(batch, position(neighborhood, box, i0, i1, box.begin[2]), first_head);
        for (int i2 = box.begin[2]; i2 < box.end[2]; ++i2, to += stride) {
          prefetch<true>(to + kPrefetched * stride, heads * tensor.dim);
          for (int head = 0; head < heads; ++head, ++row) {
            store_row(to + int64_t(head) * tensor.dim, tensor.dim, rows + row * width, factor(row));
          }
        }
      }
    }
  });
}

template <typename Real>
JAX_NATTEN_INLINE void store_box(const Result& tensor, const Neighborhood& neighborhood, const Box& box, int64_t batch,
                                 int first_head, int heads, const Real* rows, int width, Real factor = 1) {
  store_box(tensor, neighborhood, box, batch, first_head, heads, rows, width, [&](int64_t) { return factor; });
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
