// What the emulator's CUtensorMap holds, and copies of boxes.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x7E4507A9;

  uint32_t magic;
  uint8_t rank, element_bytes, swizzle;  // swizzle: span in bytes, 0: none
  uint8_t element_stride[5];
  uint16_t box[5];
  uint32_t size[5];    // minus one
  uint64_t stride[4];  // in bytes, of dimensions 1 ..
  uint8_t* data;

  // Elements of the box along a dimension, as they lie in shared memory.
  int extent(int d) const { return d < rank ? (box[d] + element_stride[d] - 1) / element_stride[d] : 1; }
  int box_bytes() const { return extent(0) * extent(1) * extent(2) * extent(3) * extent(4) * element_bytes; }

  // Calls function(offset in the box before the swizzle, bytes, global address or null outside the tensor) for each run
  // of elements that is wholly inside or outside.
  template <typename Function>
  void for_each_run(const int (&coordinates)[5], Function function) const {
    const int row_bytes = extent(0) * element_bytes;
    int index[5] = {};
    for (int row = 0, rows = box_bytes() / row_bytes; row < rows; ++row) {
      bool inside = true;
      int64_t offset = 0;
      for (int d = 1; d < rank; ++d) {
        const int64_t x = int64_t(coordinates[d]) + index[d] * element_stride[d];
        inside = inside && x >= 0 && x <= int64_t(size[d]);
        offset += x * int64_t(stride[d - 1]);
      }
      for (int i = 0; i < extent(0);) {
        const auto in = [&](int j) {
          return inside && int64_t(coordinates[0]) + j >= 0 && int64_t(coordinates[0]) + j <= int64_t(size[0]);
        };
        int end = i + 1;
        while (end < extent(0) && in(end) == in(i)) ++end;
        function(row * row_bytes + i * element_bytes, (end - i) * element_bytes,
                 in(i) ? data + offset + (int64_t(coordinates[0]) + i) * element_bytes : nullptr);
        i = end;
      }
      for (int d = 1; d < rank && ++index[d] == extent(d); ++d) index[d] = 0;
    }
  }
};
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap has 128 bytes");

// Where the byte at `address` lies after the swizzle.
inline uint32_t swizzled(uint32_t address, int span) {
  return span == 0 ? address : address ^ (address >> 3 & uint32_t(span - 16));
}

}  // namespace emulator
