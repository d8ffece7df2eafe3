// A CPU emulator of CUDA's execution model, enough to run the project's kernels (README.md says what is modelled).
//
// This header is what tests and the stand-ins of CUDA's headers (include/) use; the engine is in the .cc files that are
// not tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// ---- for tests

struct Settings {
  uint64_t seed = 0;   // of the order of threads, CTAs and asynchronous operations
  int processors = 2;  // multiprocessors that the device reports
  int capability[2] = {9, 0};
  bool quiet = false;  // do not print errors
};

void configure(const Settings& settings);

// What was wrong with the last launch; empty if nothing was.
const std::string& error();

// A global-memory array between guard pages: touching a byte behind it or well before it ends the process with a
// message. It begins with `fill` bytes.
class Memory {
 public:
  explicit Memory(size_t bytes, uint8_t fill = 0xA5);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  // The bytes between the array and the guard pages are untouched.
  bool intact() const;

 private:
  uint8_t *base_, *data_;
  size_t mapped_, bytes_;
};

// ---- for the stand-ins

struct Index {
  unsigned x, y, z;
};

// A place in the source, by default the caller's.
struct Where {
  const char* file;
  int line;
  static Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Thread;
extern Thread* current;  // null outside kernels

constexpr uint32_t kSharedBase = 1024;  // address of dynamic shared memory, as on the hardware
constexpr int kMostSharedBytes = 227 * 1024;

// Ends the launch with a message that names the thread. From a thread it does not return.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

uint32_t shared_address(const void* pointer);
// The bytes at a shared address, checked.
uint8_t* shared_bytes(uint32_t address, int bytes, int alignment, const char* what);

// Notes that a lane of the current warp has written through the generic proxy. TMA stores and wgmma must not read the
// bytes before that lane's async_proxy_fence().
void generic_write(int lane, uint32_t address, int bytes);
void async_proxy_fence();

int lane();
bool chance(int one_in);
// A point where other threads may overtake this one.
void interruption();

// Waits for the lanes of `mask`; the last to come calls combine(operands of the lanes, null for those outside).
void meet_lanes(const char* what, uint32_t mask, void* operand, void (*combine)(void** operands, uint32_t mask),
                Where where);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);  // `bytes` are expected first
void barrier_expect(uint64_t* barrier, int bytes);
bool barrier_test(uint64_t* barrier, uint32_t parity);
void barrier_wait(uint64_t* barrier, uint32_t parity, Where where);
void named_barrier(int id, int threads, bool wait, Where where);
void sync_threads(Where where);

void tma_load(uint32_t destination, const void* map, uint64_t* barrier, const int (&coordinates)[5]);
void tma_store(const void* map, uint32_t source, const int (&coordinates)[5]);
void tma_store_commit();
void tma_store_wait_read();

// cp.async: the first `valid` of `bytes` from memory, zeros behind.
void async_copy(uint32_t destination, const void* source, int bytes, int valid);
void async_copy_commit();
void async_copy_wait(int pending);
void async_copy_arrive(uint64_t* barrier);

struct WgmmaOperand {
  float* accumulators;
  const uint32_t* a;  // registers, or null: `a_descriptor`
  uint64_t a_descriptor, b_descriptor;
  int columns;
  bool half, accumulate;
};
void wgmma(WgmmaOperand operand, Where where);
void wgmma_fence();
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);

// Runs a grid to its end; every thread calls enter(argument). 0 or a number of include/cuda_runtime_api.h.
int launch(void (*enter)(const void*), const void* argument, Index grid, Index block, size_t shared_bytes);
// The same for a kernel of unknown type that takes one struct, at `params` on the caller's stack.
int launch_untyped(const void* kernel, const void* params, Index grid, Index block, size_t shared_bytes);
const Settings& settings();

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}
uint16_t float_to_bfloat16(float x);

}  // namespace emulator

// CUDA's built-in variables.
extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;
