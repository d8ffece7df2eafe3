#include "emulator.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>

#include "fiber.h"
#include "tensor_map.h"

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// The engine runs one CTA at a time, on one CPU thread. Each CUDA thread is a fiber that runs until it waits for
// something (or until interruption() lets others overtake). Whoever makes a wait end marks the thread as ready.

struct Copy {  // cp.async
  uint32_t destination;
  const void* source;
  int bytes, valid;
};

struct Thread {
  Fiber fiber;
  Index index;
  int linear, warp, lane;
  bool exited;
  const char* waits_for;
  Where where;
  uint64_t detail[2];
  std::vector<Copy> copies;                   // not committed
  std::deque<std::vector<Copy>> copy_groups;  // committed
};

Thread* current = nullptr;

namespace {

constexpr int kMostThreads = 1024;
constexpr int kCanaryBytes = 4096;
constexpr uint8_t kCanary = 0xC5;

Settings the_settings;
std::string the_error;

}  // namespace

extern "C" {
alignas(1024) uint8_t emulator_memory[kMostSharedBytes + kCanaryBytes];
}

namespace {

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 32);
  }
  int below(int n) { return int(uint64_t(next()) * n >> 32); }
} randomness;

// ---- state of a CTA

struct AsyncOperation {
  enum Kind { kLoad, kStore, kArrive } kind;
  TensorMap map;
  uint32_t address;  // in shared memory
  int coordinates[5];
  uint64_t* barrier;
  Thread* thread;
  bool committed;
};

struct Meeting {
  const char* what;
  uint32_t mask, arrived;
  void* operands[32];
};

struct GroupMeeting {
  const char* what = nullptr;
  int arrived = 0;
  void* operands[128];
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

struct Accumulators {
  float* registers[128];
  int columns;
  std::vector<float> tile;  // 64 x columns
  int in_flight;
};

struct WgmmaOperation {
  std::shared_ptr<Accumulators> accumulators;
  std::vector<uint16_t> a;  // 64 x 16 from registers, or empty
  uint64_t a_descriptor, b_descriptor;
  bool half, accumulate, done;
};

struct Warpgroup {
  GroupMeeting meeting;
  std::vector<WgmmaOperation> open;
  std::deque<std::vector<WgmmaOperation>> groups;
  std::vector<std::shared_ptr<Accumulators>> accumulators;
  uint32_t fenced[4];  // bits: lanes of the warps
};

struct Cta {
  int threads = 0, live = 0, warps = 0;
  size_t shared_bytes = 0;
  uint32_t ready[32];  // lanes
  uint32_t ready_warps;
  std::vector<Meeting> meetings[32];
  Warpgroup warpgroups[8];
  NamedBarrier named[16];
  std::map<uint64_t*, std::vector<Thread*>> barrier_waiters;
  std::vector<AsyncOperation> operations;
  bool failed = false;
} cta;

std::vector<std::unique_ptr<Thread>> pool;

// Who is slow, and how soon asynchronous operations happen, for a random number of steps.
struct Epoch {
  int steps = 0;
  uint32_t slow_warps = 0, slow_lanes = 0;
  int operation_one_in = 1;  // 0: only when all threads wait
} epoch;

void begin_epoch() {
  epoch.steps = 1 + randomness.below(1 << randomness.below(10));
  epoch.slow_warps = randomness.below(2) ? randomness.next() & randomness.next() : 0;
  epoch.slow_lanes = randomness.below(2) ? randomness.next() & randomness.next() : 0;
  const int choices[] = {0, 1, 4, 30};
  epoch.operation_one_in = choices[randomness.below(4)];
}

void (*enter_kernel)(const void*);
const void* kernel_argument;

// A kernel's struct, or more than it.
struct alignas(64) Parameters {
  uint8_t bytes[12288];
} the_parameters;

void suspend() { current->fiber.suspend(); }

void wake(Thread* thread) {
  cta.ready[thread->warp] |= 1u << thread->lane;
  cta.ready_warps |= 1u << thread->warp;
}

void wait(const char* what, Where where, uint64_t detail0 = 0, uint64_t detail1 = 0) {
  Thread* self = current;
  cta.ready[self->warp] &= ~(1u << self->lane);
  if (cta.ready[self->warp] == 0) cta.ready_warps &= ~(1u << self->warp);
  self->waits_for = what;
  self->where = where;
  self->detail[0] = detail0;
  self->detail[1] = detail1;
  suspend();
}

void run_thread() {
  enter_kernel(kernel_argument);
  Thread* self = current;
  async_copy_commit();
  async_copy_wait(0);
  self->exited = true;
  --cta.live;
  wait("nothing", {"", 0});
  std::abort();
}

// ---- mbarriers: the 64 bits hold, from the lowest, phase (1), expected (12), pending (12), bytes (28, signed), a mark

struct BarrierState {
  static constexpr uint64_t kMark = 0x5B7;
  unsigned phase;
  int expected, pending;
  int64_t bytes;

  bool load(const uint64_t* barrier) {
    const uint64_t x = *barrier;
    phase = x & 1;
    expected = x >> 1 & 0xFFF;
    pending = x >> 13 & 0xFFF;
    bytes = int64_t(x << 11) >> 36;
    return x >> 53 == kMark;
  }
  void store(uint64_t* barrier) const {
    *barrier =
        kMark << 53 | (uint64_t(bytes) & 0xFFFFFFF) << 25 | uint64_t(pending) << 13 | uint64_t(expected) << 1 | phase;
  }
};

bool load_barrier(uint64_t* barrier, BarrierState& state, const char* what) {
  shared_bytes(shared_address(barrier), 8, 8, what);
  if (cta.failed) return false;
  if (!state.load(barrier)) {
    fail("%s: no mbarrier at shared address %u (not initialised, or overwritten)", what, shared_address(barrier));
    return false;
  }
  return true;
}

void finish_phase_if_complete(uint64_t* barrier, BarrierState& state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
    auto found = cta.barrier_waiters.find(barrier);
    if (found != cta.barrier_waiters.end()) {
      for (Thread* thread : found->second) wake(thread);  // they look again
      found->second.clear();
    }
  }
  state.store(barrier);
}

void complete_bytes(uint64_t* barrier, int bytes) {
  BarrierState state;
  if (!load_barrier(barrier, state, "completion of a copy")) return;
  state.bytes -= bytes;
  finish_phase_if_complete(barrier, state);
}

// ---- asynchronous operations

void perform_copy(const Copy& copy) {
  uint8_t* destination = shared_bytes(copy.destination, copy.bytes, copy.bytes, "cp.async");
  if (destination == nullptr) return;
  std::memset(destination, 0, copy.bytes);
  if (copy.valid > 0) std::memcpy(destination, copy.source, copy.valid);
}

void perform_copies(Thread* thread, int pending) {
  while (int(thread->copy_groups.size()) > pending) {
    for (const Copy& copy : thread->copy_groups.front()) perform_copy(copy);
    thread->copy_groups.pop_front();
  }
}

void perform(size_t i) {
  const AsyncOperation operation = cta.operations[i];
  cta.operations[i] = cta.operations.back();
  cta.operations.pop_back();
  const TensorMap& map = operation.map;
  switch (operation.kind) {
    case AsyncOperation::kLoad: {
      const uint32_t start = operation.address;
      if (shared_bytes(start, map.box_bytes(), 128, "TMA load") == nullptr) return;
      map.for_each_run(operation.coordinates, [&](int offset, int bytes, const uint8_t* source) {
        for (int done = 0; done < bytes; ++done) {  // a run may have several 16-byte pieces
          emulator_memory[swizzled(start + offset + done, map.swizzle) - kSharedBase] = source ? source[done] : 0;
        }
      });
      complete_bytes(operation.barrier, map.box_bytes());
      break;
    }
    case AsyncOperation::kStore: {
      const uint32_t start = operation.address;
      if (shared_bytes(start, map.box_bytes(), 128, "TMA store") == nullptr) return;
      map.for_each_run(operation.coordinates, [&](int offset, int bytes, uint8_t* destination) {
        for (int done = 0; destination != nullptr && done < bytes; ++done) {
          destination[done] = emulator_memory[swizzled(start + offset + done, map.swizzle) - kSharedBase];
        }
      });
      break;
    }
    case AsyncOperation::kArrive: {
      perform_copies(operation.thread, 0);
      BarrierState state;
      if (!load_barrier(operation.barrier, state, "cp.async.mbarrier.arrive")) return;
      if (state.pending == 0)
        return fail("mbarrier at %u: more arrivals than expected", shared_address(operation.barrier));
      --state.pending;
      finish_phase_if_complete(operation.barrier, state);
      break;
    }
  }
}

// ---- wgmma

struct MatrixDescriptor {
  uint32_t start, leading, stride;
  int span;

  explicit MatrixDescriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3FFF) << 4),
        leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
        stride(uint32_t(bits >> 32 & 0x3FFF) << 4) {
    const int code = int(bits >> 62);
    span = code == 1 ? 128 : code == 2 ? 64 : code == 3 ? 32 : 0;
    if (span == 0) {
      fail("wgmma: descriptor without swizzle: not modelled");
    } else if (bits >> 49 & 7) {
      fail("wgmma: descriptor with a base offset: not modelled");
    } else if (start % (8 * span) >= uint32_t(span)) {
      fail("wgmma: descriptor begins inside a swizzle atom, at address %u", start);
    }
  }

  // Eight 16-bit elements that are contiguous before the swizzle.
  const uint16_t* eight(uint32_t address) const {
    return reinterpret_cast<const uint16_t*>(shared_bytes(swizzled(address, span), 16, 16, "wgmma operand"));
  }
};

void to_floats(const uint16_t* from, int count, bool half, float* to, int step) {
  for (int i = 0; i < count; ++i) to[i * step] = half ? half_to_float(from[i]) : bfloat16_to_float(from[i]);
}

// rows x 16, row-major, the 16 contiguous in memory.
void read_rows(const MatrixDescriptor& matrix, int rows, bool half, float* to) {
  if (matrix.start % matrix.span + 32 > uint32_t(matrix.span)) return fail("wgmma: 16 elements leave the swizzle span");
  for (int row = 0; row < rows; ++row) {
    for (int piece = 0; piece < 2; ++piece) {
      const uint16_t* from = matrix.eight(matrix.start + row / 8 * matrix.stride + row % 8 * matrix.span + piece * 16);
      if (from == nullptr) return;
      to_floats(from, 8, half, to + 16 * row + 8 * piece, 1);
    }
  }
}

// 16 x columns, row-major, the columns contiguous in memory ("transposed").
void read_columns(const MatrixDescriptor& matrix, int columns, bool half, float* to) {
  const int atom = matrix.span / 2;
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; n += 8) {
      const uint16_t* from = matrix.eight(matrix.start + n / atom * matrix.leading + k / 8 * matrix.stride +
                                          k % 8 * matrix.span + n % atom * 2);
      if (from == nullptr) return;
      to_floats(from, 8, half, to + k * columns + n, 1);
    }
  }
}

void perform(WgmmaOperation& operation) {
  if (operation.done || cta.failed) return;
  operation.done = true;
  Accumulators& accumulators = *operation.accumulators;
  const int columns = accumulators.columns;
  static float a[64 * 16], b[16 * 256], rows[256 * 16];
  if (operation.a.empty()) {
    read_rows(MatrixDescriptor(operation.a_descriptor), 64, operation.half, a);
    read_rows(MatrixDescriptor(operation.b_descriptor), columns, operation.half, rows);
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) b[k * columns + n] = rows[16 * n + k];
    }
  } else {
    to_floats(operation.a.data(), 64 * 16, operation.half, a, 1);
    read_columns(MatrixDescriptor(operation.b_descriptor), columns, operation.half, b);
  }
  if (cta.failed) return;
  for (int row = 0; row < 64; ++row) {
    float* __restrict d = &accumulators.tile[row * columns];
    if (!operation.accumulate) std::fill(d, d + columns, 0.f);
    for (int k = 0; k < 16; ++k) {
      const float x = a[16 * row + k];
      const float* __restrict y = b + k * columns;
      for (int n = 0; n < columns; ++n) d[n] += x * y[n];
    }
  }
}

// Registers of an accumulator: element 4 j + 2 i + b of a thread.
template <typename Function>
void for_each_accumulator(int columns, Function function) {
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    for (int e = 0; e < columns / 2; ++e) {
      function(thread, e, row + e / 2 % 2 * 8, e / 4 * 8 + thread % 4 * 2 + e % 2);
    }
  }
}

void retire(Warpgroup& warpgroup, std::vector<WgmmaOperation>& group) {
  for (WgmmaOperation& operation : group) {
    perform(operation);
    Accumulators& accumulators = *operation.accumulators;
    if (--accumulators.in_flight > 0) continue;
    for_each_accumulator(accumulators.columns, [&](int thread, int e, int row, int column) {
      accumulators.registers[thread][e] = accumulators.tile[row * accumulators.columns + column];
    });
    auto& all = warpgroup.accumulators;
    all.erase(std::find(all.begin(), all.end(), operation.accumulators));
  }
}

Warpgroup& warpgroup_of(const Thread* thread) { return cta.warpgroups[thread->warp / 4]; }

// ---- scheduler

bool perform_something() {
  if (!cta.operations.empty()) {
    perform(randomness.below(int(cta.operations.size())));
    return true;
  }
  return false;
}

void perform_some_wgmma() {
  for (Warpgroup& warpgroup : cta.warpgroups) {
    for (auto& group : warpgroup.groups) {
      for (WgmmaOperation& operation : group) perform(operation);
    }
  }
}

std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    text += (i ? ", " : "") + std::to_string(numbers[i]) + (j > i ? "-" + std::to_string(numbers[j]) : "");
    i = j + 1;
  }
  return text;
}

std::string describe_waits() {
  std::map<std::string, std::vector<int>> waits;
  for (int i = 0; i < cta.threads; ++i) {
    const Thread& thread = *pool[i];
    if (thread.exited) continue;
    std::string text = thread.waits_for;
    if (text == "mbarrier") {
      BarrierState state;
      state.load(reinterpret_cast<uint64_t*>(thread.detail[0]));
      char buffer[160];
      std::snprintf(buffer, sizeof(buffer), " at %u for parity %d (phase %u, %d of %d arrivals and %lld bytes pending)",
                    shared_address(reinterpret_cast<uint64_t*>(thread.detail[0])), int(thread.detail[1]), state.phase,
                    state.pending, state.expected, static_cast<long long>(state.bytes));
      text += buffer;
    } else if (text == "named barrier") {
      const NamedBarrier& barrier = cta.named[thread.detail[0]];
      text += " " + std::to_string(thread.detail[0]) + " (" + std::to_string(barrier.arrived) + " of " +
              std::to_string(barrier.threads) + " threads)";
    }
    const char* file = std::strrchr(thread.where.file, '/');
    text += " at " + std::string(file ? file + 1 : thread.where.file) + ":" + std::to_string(thread.where.line);
    waits[text].push_back(i);
  }
  std::string text;
  for (const auto& wait : waits) text += "\n  threads " + ranges(wait.second) + " wait for " + wait.first;
  return text;
}

int random_bit(uint32_t mask) {
  int skip = randomness.below(__builtin_popcount(mask));
  while (skip-- > 0) mask &= mask - 1;
  return __builtin_ctz(mask);
}

void run_threads() {
  while (cta.live > 0 && !cta.failed) {
    if (--epoch.steps < 0) begin_epoch();
    if (epoch.operation_one_in > 0 && randomness.below(epoch.operation_one_in) == 0) {
      if (randomness.below(4) == 0) perform_some_wgmma();
      perform_something();
    }
    if (cta.ready_warps == 0) {
      if (perform_something()) continue;
      return fail("deadlock%s", describe_waits().c_str());
    }
    uint32_t warps = cta.ready_warps & ~epoch.slow_warps;
    if (warps == 0 || randomness.below(64) == 0) warps = cta.ready_warps;
    const int warp = random_bit(warps);
    uint32_t lanes = cta.ready[warp] & ~epoch.slow_lanes;
    if (lanes == 0 || randomness.below(16) == 0) lanes = cta.ready[warp];
    const int first = randomness.below(32);
    lanes = lanes >> first | (first ? lanes << (32 - first) : 0);
    while (lanes != 0 && !cta.failed) {
      const int lane = (__builtin_ctz(lanes) + first) % 32;
      lanes &= lanes - 1;
      current = pool[32 * warp + lane].get();
      threadIdx = current->index;
      current->fiber.resume();
      current = nullptr;
    }
  }
}

void check_after_cta() {
  if (cta.failed) return;
  for (const AsyncOperation& operation : cta.operations) {
    if (operation.kind == AsyncOperation::kLoad) return fail("the CTA ended before a TMA load");
    if (operation.kind == AsyncOperation::kStore) {
      return fail("the CTA ended before a TMA store had read shared memory (or it was never committed)");
    }
  }
  for (const Warpgroup& warpgroup : cta.warpgroups) {
    if (!warpgroup.open.empty() || !warpgroup.groups.empty())
      return fail("the CTA ended before a wgmma was waited for");
  }
  for (size_t i = cta.shared_bytes; i < sizeof(emulator_memory); ++i) {
    if (emulator_memory[i] != kCanary) {
      return fail("shared memory was written %zu bytes behind its end", i - cta.shared_bytes);
    }
  }
}

void run_cta(int threads, size_t shared_bytes) {
  cta = Cta();
  cta.threads = cta.live = threads;
  cta.warps = (threads + 31) / 32;
  cta.shared_bytes = shared_bytes;
  for (Warpgroup& warpgroup : cta.warpgroups) std::memset(warpgroup.fenced, 0, sizeof(warpgroup.fenced));
  std::memset(cta.ready, 0, sizeof(cta.ready));
  cta.ready_warps = 0;
  std::memset(emulator_memory, 0xFF, shared_bytes);  // not a number, in every floating-point type
  std::memset(emulator_memory + shared_bytes, kCanary, sizeof(emulator_memory) - shared_bytes);
  while (int(pool.size()) < threads) pool.push_back(std::make_unique<Thread>());
  for (int i = 0; i < threads; ++i) {
    Thread& thread = *pool[i];
    thread.linear = i;
    thread.warp = i / 32;
    thread.lane = i % 32;
    const unsigned n = unsigned(i);
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    thread.exited = false;
    thread.waits_for = "its start";
    thread.where = {"", 0};
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.fiber.prepare(run_thread);
    wake(&thread);
  }
  epoch.steps = 0;
  run_threads();
  check_after_cta();
}

void on_bad_access(int, siginfo_t* information, void*) {
  char text[256];
  const int length = std::snprintf(
      text, sizeof(text), "emulator: bad memory access at %p by thread %d of CTA (%u, %u, %u), last wait at %s:%d\n",
      information->si_addr, current ? current->linear : -1, blockIdx.x, blockIdx.y, blockIdx.z,
      current ? current->where.file : "", current ? current->where.line : 0);
  if (write(2, text, length) < 0) std::abort();
  std::signal(SIGABRT, SIG_DFL);
  std::abort();
}

void catch_bad_accesses() {
  static bool done = false;
  if (done) return;
  done = true;
  static uint8_t stack[65536];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

// The struct may be shorter than Parameters: copies only what lies on the caller's stack.
bool copy_parameters(const void* params) {
  pthread_attr_t attributes;
  void* low;
  size_t bytes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return false;
  pthread_attr_getstack(&attributes, &low, &bytes);
  pthread_attr_destroy(&attributes);
  const uint8_t *begin = static_cast<const uint8_t*>(params), *end = static_cast<uint8_t*>(low) + bytes;
  if (begin < low || begin >= end) return false;
  std::memcpy(&the_parameters, params, std::min(sizeof(the_parameters), size_t(end - begin)));
  return true;
}

}  // namespace

void configure(const Settings& settings) { the_settings = settings; }
const Settings& settings() { return the_settings; }
const std::string& error() { return the_error; }

void fail(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!cta.failed) {
    cta.failed = true;
    the_error = text;
    char where[128] = "";
    if (current != nullptr)
      std::snprintf(where, sizeof(where), " [thread %d, warp %d lane %d, after %s:%d]", current->linear, current->warp,
                    current->lane, current->where.file, current->where.line);
    the_error += where;
    char block[64];
    std::snprintf(block, sizeof(block), " [CTA %u, %u, %u]", blockIdx.x, blockIdx.y, blockIdx.z);
    the_error += block;
    if (!the_settings.quiet) std::fprintf(stderr, "emulator: %s\n", the_error.c_str());
  }
  if (current != nullptr) suspend();
}

int lane() { return current->lane; }
bool chance(int one_in) { return randomness.below(one_in) == 0; }
void interruption() {
  if (chance(8)) suspend();
}

uint32_t shared_address(const void* pointer) {
  const uint8_t* byte = static_cast<const uint8_t*>(pointer);
  if (byte < emulator_memory || byte > emulator_memory + cta.shared_bytes) {
    fail("not an address of dynamic shared memory: %p", pointer);
    return 0;
  }
  return uint32_t(byte - emulator_memory) + kSharedBase;
}

uint8_t* shared_bytes(uint32_t address, int bytes, int alignment, const char* what) {
  if (address % alignment != 0) {
    fail("%s: shared address %u is not a multiple of %d", what, address, alignment);
    return nullptr;
  }
  if (address < kSharedBase || address + bytes > kSharedBase + cta.shared_bytes) {
    fail("%s: %d bytes at shared address %u are outside of shared memory (%zu bytes from %u)", what, bytes, address,
         cta.shared_bytes, kSharedBase);
    return nullptr;
  }
  return emulator_memory + (address - kSharedBase);
}

// ---- meetings

void meet_lanes(const char* what, uint32_t mask, void* operand, void (*combine)(void**, uint32_t), Where where) {
  Thread* self = current;
  const int last_warp_lanes = cta.threads % 32;
  if (self->warp == cta.warps - 1 && last_warp_lanes != 0) mask &= (1u << last_warp_lanes) - 1;
  if (!(mask >> self->lane & 1)) return fail("%s: the mask %08x lacks the lane itself", what, mask);
  auto& meetings = cta.meetings[self->warp];
  size_t i = 0;
  while (i < meetings.size() && !(meetings[i].mask >> self->lane & 1)) ++i;
  if (i == meetings.size()) meetings.push_back({what, mask, 0, {}});
  Meeting& meeting = meetings[i];
  if (std::strcmp(meeting.what, what) != 0 || meeting.mask != mask) {
    return fail("lanes of warp %d diverge: some are at %s (mask %08x), lane %d is at %s (mask %08x)%s", self->warp,
                meeting.what, meeting.mask, self->lane, what, mask, describe_waits().c_str());
  }
  meeting.arrived |= 1u << self->lane;
  meeting.operands[self->lane] = operand;
  if (meeting.arrived != mask) return wait(what, where);
  Meeting done = meeting;
  meetings.erase(meetings.begin() + i);
  if (combine != nullptr) combine(done.operands, mask);
  for (uint32_t rest = mask & ~(1u << self->lane); rest != 0; rest &= rest - 1) {
    wake(pool[32 * self->warp + __builtin_ctz(rest)].get());
  }
  self->where = where;
  interruption();
}

void meet_warpgroup(const char* what, void* operand, void (*combine)(void**), Where where) {
  Thread* self = current;
  GroupMeeting& meeting = warpgroup_of(self).meeting;
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0) {
    return fail("warpgroup %d diverges: some threads are at %s, this one at %s%s", self->warp / 4, meeting.what, what,
                describe_waits().c_str());
  }
  meeting.operands[self->linear % 128] = operand;
  if (++meeting.arrived < 128) return wait(what, where);
  meeting.arrived = 0;
  void* operands[128];
  std::copy(meeting.operands, meeting.operands + 128, operands);
  self->where = where;
  if (combine != nullptr) combine(operands);
  for (int i = 0; i < 128; ++i) {
    Thread* thread = pool[self->warp / 4 * 128 + i].get();
    if (thread != self) wake(thread);
  }
  interruption();
}

// ---- barriers

void barrier_init(uint64_t* barrier, int arrivals) {
  shared_bytes(shared_address(barrier), 8, 8, "mbarrier.init");
  if (arrivals < 1 || arrivals > 0xFFF) return fail("mbarrier.init: %d arrivals", arrivals);
  BarrierState state;
  if (state.load(barrier)) return fail("mbarrier at %u is initialised twice", shared_address(barrier));
  BarrierState{0, arrivals, arrivals, 0}.store(barrier);
}

void barrier_expect(uint64_t* barrier, int bytes) {
  BarrierState state;
  if (!load_barrier(barrier, state, "mbarrier.expect_tx")) return;
  state.bytes += bytes;
  state.store(barrier);
}

void barrier_arrive(uint64_t* barrier, int bytes) {
  interruption();
  BarrierState state;
  if (!load_barrier(barrier, state, "mbarrier.arrive")) return;
  if (state.pending == 0) return fail("mbarrier at %u: more arrivals than expected", shared_address(barrier));
  state.bytes += bytes;
  --state.pending;
  finish_phase_if_complete(barrier, state);
  interruption();
}

bool barrier_test(uint64_t* barrier, uint32_t parity) {
  BarrierState state;
  if (!load_barrier(barrier, state, "mbarrier.test_wait")) return true;
  if (state.phase != (parity & 1)) return true;
  suspend();  // a thread that polls lets others run
  return false;
}

void barrier_wait(uint64_t* barrier, uint32_t parity, Where where) {
  if (parity > 1) return fail("mbarrier.try_wait.parity: parity %u", parity);
  for (;;) {
    BarrierState state;
    if (!load_barrier(barrier, state, "mbarrier.try_wait")) return;
    if (state.phase != parity) break;
    cta.barrier_waiters[barrier].push_back(current);
    wait("mbarrier", where, reinterpret_cast<uint64_t>(barrier), parity);
  }
  current->where = where;
  interruption();
}

void named_barrier(int id, int threads, bool waits, Where where) {
  if (id < 0 || id > 15) return fail("bar: no barrier %d", id);
  if (threads % 32 != 0 && threads != cta.threads) return fail("bar: %d threads are not whole warps", threads);
  NamedBarrier& barrier = cta.named[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) return fail("bar %d: for %d threads and for %d", id, barrier.threads, threads);
  if (++barrier.arrived < threads) {
    if (waits) {
      barrier.waiting.push_back(current);
      wait("named barrier", where, id);
    } else {
      interruption();
    }
    return;
  }
  barrier.arrived = 0;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
  current->where = where;
  interruption();
}

void sync_threads(Where where) { named_barrier(0, cta.threads, true, where); }

// ---- TMA

namespace {

bool queue_tensor_copy(AsyncOperation::Kind kind, uint32_t address, const void* map, uint64_t* barrier,
                       const int (&coordinates)[5]) {
  const char* what = kind == AsyncOperation::kLoad ? "TMA load" : "TMA store";
  AsyncOperation operation;
  operation.kind = kind;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return fail("%s: the tensor map is not 64-byte aligned", what), false;
  std::memcpy(&operation.map, map, sizeof(TensorMap));
  if (operation.map.magic != TensorMap::kMagic) return fail("%s: the tensor map was never encoded", what), false;
  if (operation.map.rank != 5) return fail("%s: the tensor map has rank %d", what, operation.map.rank), false;
  if (shared_bytes(address, operation.map.box_bytes(), 128, what) == nullptr) return false;
  if (operation.map.swizzle != 0 && address % (8 * operation.map.swizzle) != 0) {
    return fail("%s: shared address %u does not begin a swizzle pattern of %d bytes", what, address,
                8 * operation.map.swizzle),
           false;
  }
  operation.address = address;
  std::copy(coordinates, coordinates + 5, operation.coordinates);
  operation.barrier = barrier;
  operation.thread = current;
  operation.committed = false;
  cta.operations.push_back(operation);
  return true;
}

}  // namespace

void tma_load(uint32_t destination, const void* map, uint64_t* barrier, const int (&coordinates)[5]) {
  BarrierState state;
  if (!load_barrier(barrier, state, "TMA load")) return;
  queue_tensor_copy(AsyncOperation::kLoad, destination, map, barrier, coordinates);
  interruption();
}

void tma_store(const void* map, uint32_t source, const int (&coordinates)[5]) {
  for (const int x : coordinates) {
    if (x < 0) return fail("TMA store: negative coordinate %d", x);
  }
  queue_tensor_copy(AsyncOperation::kStore, source, map, nullptr, coordinates);
  interruption();
}

void tma_store_commit() {
  for (AsyncOperation& operation : cta.operations) {
    if (operation.kind == AsyncOperation::kStore && operation.thread == current) operation.committed = true;
  }
}

void tma_store_wait_read() {
  interruption();
  for (size_t i = 0; i < cta.operations.size();) {
    const AsyncOperation& operation = cta.operations[i];
    if (operation.kind == AsyncOperation::kStore && operation.thread == current && operation.committed) {
      perform(i);
    } else {
      ++i;
    }
  }
}

// ---- cp.async

void async_copy(uint32_t destination, const void* source, int bytes, int valid) {
  if (shared_bytes(destination, bytes, bytes, "cp.async") == nullptr) return;
  if (valid < 0 || valid > bytes) return fail("cp.async: %d of %d bytes", valid, bytes);
  if (valid > 0 && reinterpret_cast<uintptr_t>(source) % bytes != 0)
    return fail("cp.async: misaligned source %p", source);
  const Copy copy = {destination, source, bytes, valid};
  if (chance(4)) return perform_copy(copy);  // as early as can be
  current->copies.push_back(copy);
}

void async_copy_commit() {
  current->copy_groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void async_copy_wait(int pending) {
  interruption();
  perform_copies(current, pending);
}

void async_copy_arrive(uint64_t* barrier) {
  BarrierState state;
  if (!load_barrier(barrier, state, "cp.async.mbarrier.arrive")) return;
  AsyncOperation operation;
  operation.kind = AsyncOperation::kArrive;
  operation.barrier = barrier;
  operation.thread = current;
  operation.committed = false;
  async_copy_commit();
  cta.operations.push_back(operation);
  interruption();
}

// ---- wgmma

void wgmma(WgmmaOperand operand, Where where) {
  meet_warpgroup(
      "wgmma", &operand,
      [](void** operands) {
        const WgmmaOperand* all[128];
        for (int i = 0; i < 128; ++i) all[i] = static_cast<WgmmaOperand*>(operands[i]);
        const WgmmaOperand& first = *all[0];
        Warpgroup& warpgroup = warpgroup_of(current);
        for (int i = 1; i < 128; ++i) {
          if (all[i]->b_descriptor != first.b_descriptor || all[i]->accumulate != first.accumulate ||
              (first.a == nullptr && all[i]->a_descriptor != first.a_descriptor)) {
            return fail("wgmma: the threads of a warpgroup differ in descriptors or predicate");
          }
        }
        for (const uint32_t fenced : warpgroup.fenced) {
          if (fenced != ~0u) return fail("wgmma without a wgmma_fence() since the last wait");
        }
        std::shared_ptr<Accumulators> accumulators;
        for (const auto& in_flight : warpgroup.accumulators) {
          if (in_flight->registers[0] == first.accumulators) accumulators = in_flight;
        }
        if (accumulators == nullptr) {
          accumulators = std::make_shared<Accumulators>();
          accumulators->columns = first.columns;
          accumulators->in_flight = 0;
          accumulators->tile.resize(64 * first.columns);
          for (int i = 0; i < 128; ++i) accumulators->registers[i] = all[i]->accumulators;
          // In flight the registers hold nothing that may be read.
          for_each_accumulator(first.columns, [&](int thread, int e, int row, int column) {
            float& x = accumulators->registers[thread][e];
            accumulators->tile[row * first.columns + column] = x;
            x = NAN;
          });
          warpgroup.accumulators.push_back(accumulators);
        }
        for (int i = 0; i < 128; ++i) {
          if (accumulators->registers[i] != all[i]->accumulators || accumulators->columns != first.columns) {
            return fail("wgmma: accumulators in flight are used as others");
          }
        }
        ++accumulators->in_flight;
        WgmmaOperation operation = {accumulators,     {},   first.a_descriptor, first.b_descriptor, first.half,
                                    first.accumulate, false};
        if (first.a != nullptr) {
          operation.a.resize(64 * 16);
          for (int i = 0; i < 128; ++i) {
            for (int e = 0; e < 8; ++e) {
              const int row = i / 32 * 16 + i % 32 / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + i % 4 * 2 + e % 2;
              operation.a[16 * row + column] = uint16_t(all[i]->a[e / 2] >> (e % 2 * 16));
            }
          }
        }
        warpgroup.open.push_back(std::move(operation));
      },
      where);
}

void wgmma_fence() { warpgroup_of(current).fenced[current->warp % 4] |= 1u << current->lane; }

void wgmma_commit(Where where) {
  meet_warpgroup(
      "wgmma_commit", nullptr,
      [](void**) {
        Warpgroup& warpgroup = warpgroup_of(current);
        warpgroup.groups.push_back(std::move(warpgroup.open));
        warpgroup.open.clear();
      },
      where);
}

void wgmma_wait(int pending, Where where) {
  meet_warpgroup(
      "wgmma_wait", &pending,
      [](void** operands) {
        Warpgroup& warpgroup = warpgroup_of(current);
        while (int(warpgroup.groups.size()) > *static_cast<int*>(operands[0]) && !cta.failed) {
          retire(warpgroup, warpgroup.groups.front());
          warpgroup.groups.pop_front();
        }
        std::memset(warpgroup.fenced, 0, sizeof(warpgroup.fenced));
      },
      where);
}

// ---- launch

int launch(void (*enter)(const void*), const void* argument, Index grid, Index block, size_t shared_bytes) {
  constexpr int kInvalidValue = 1, kLaunchFailure = 719;
  the_error.clear();
  catch_bad_accesses();
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, ctas = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || ctas == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > size_t(kMostSharedBytes)) {
    the_error = "the launch configuration is invalid";
    if (!the_settings.quiet) std::fprintf(stderr, "emulator: %s\n", the_error.c_str());
    return kInvalidValue;
  }
  enter_kernel = enter;
  kernel_argument = argument;
  gridDim = grid;
  blockDim = block;
  randomness.state = (the_settings.seed + 1) * 0x9E3779B97F4A7C15ull;
  // CTAs in a random order: they must not depend on each other.
  std::vector<uint32_t> order(ctas);
  for (uint64_t i = 0; i < ctas; ++i) order[i] = uint32_t(i);
  for (uint64_t i = ctas; i > 1; --i) std::swap(order[i - 1], order[randomness.below(int(i))]);
  for (const uint32_t i : order) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_cta(int(threads), shared_bytes);
    if (cta.failed) return kLaunchFailure;
  }
  return 0;
}

int launch_untyped(const void* kernel, const void* params, Index grid, Index block, size_t shared_bytes) {
  if (!copy_parameters(params)) {
    the_error = "the kernel's parameters must be on the stack of the caller";
    if (!the_settings.quiet) std::fprintf(stderr, "emulator: %s\n", the_error.c_str());
    return 1;
  }
  // Structs of more than 16 bytes are passed in memory, whatever their size; what lies behind one does not matter.
  const auto enter = [](const void* kernel) {
    reinterpret_cast<void (*)(Parameters)>(const_cast<void*>(kernel))(the_parameters);
  };
  return launch(enter, kernel, grid, block, shared_bytes);
}

// ---- numbers

float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      const int exponent = i >> 10 & 31, mantissa = i & 1023;
      const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                               : exponent == 0 ? std::ldexp(mantissa, -24)
                                               : std::ldexp(1024 + mantissa, exponent - 25);
      values[i] = float(i & 0x8000 ? -magnitude : magnitude);
    }
    return values;
  }();
  return table[bits];
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (std::isnan(x)) return 0x7FFF;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.f) return sign | 0x7C00;
  int exponent = std::max(magnitude == 0 ? -126 : std::ilogb(magnitude), -14);
  // Rounded to an integer multiple of the last place, to even: that is what nearbyint does.
  const int places = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | uint16_t(places < 1024 ? places : ((exponent + 15) << 10) + (places - 1024));
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// ---- memory

Memory::Memory(size_t bytes, uint8_t fill) : bytes_(bytes) {
  constexpr size_t kPage = 4096, kAlign = 128;
  const size_t used = (bytes + kAlign - 1) / kAlign * kAlign, pages = (used + kPage - 1) / kPage * kPage + kPage;
  mapped_ = pages + 2 * kPage;
  base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base_ == MAP_FAILED || mprotect(base_ + kPage, pages, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulator: no memory");
    std::abort();
  }
  data_ = base_ + kPage + pages - used;
  std::memset(base_ + kPage, kCanary, pages);
  std::memset(data_, fill, bytes);
}

Memory::~Memory() { munmap(base_, mapped_); }

bool Memory::intact() const {
  for (const uint8_t* p = base_ + 4096; p < base_ + mapped_ - 4096; ++p) {
    if ((p < data_ || p >= data_ + bytes_) && *p != kCanary) return false;
  }
  return true;
}

}  // namespace emulator

// The name under which kernels declare dynamic shared memory, in each of their namespaces.
#define EMULATOR_SHARED_MEMORY(NAMESPACE)                                                                    \
  namespace NAMESPACE {                                                                                      \
  extern uint8_t shared_memory[emulator::kMostSharedBytes + 4096] __attribute__((alias("emulator_memory"))); \
  }
EMULATOR_SHARED_MEMORY(jax_natten)
EMULATOR_SHARED_MEMORY(jax_natten::sm80)
EMULATOR_SHARED_MEMORY(jax_natten::sm90)
EMULATOR_SHARED_MEMORY(jax_natten::naive)
