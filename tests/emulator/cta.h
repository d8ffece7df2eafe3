// The state of the CTA that runs, and what the engine's parts do for each other.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "tensor_map.h"

namespace emulator {

constexpr int kCanaryBytes = 4096;  // behind shared memory
constexpr uint8_t kCanary = 0xC5;

extern "C" uint8_t emulator_memory[kMostSharedBytes + kCanaryBytes];  // shared memory

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
  std::vector<uint32_t> unfenced;             // 16-byte units that it wrote since its last fence of the proxies
};

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 32);
  }
  int below(int n) { return int(uint64_t(next()) * n >> 32); }
};

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

struct NamedBarrier {
  int threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

// A warp's share of wgmma: 16 of the 64 rows.
struct Accumulators {
  float* registers[32];
  int columns;
  std::vector<float> tile;  // 16 x columns
  int in_flight;
};

struct WgmmaOperation {
  std::shared_ptr<Accumulators> accumulators;
  std::vector<uint16_t> a;  // 16 x 16 from registers, or empty
  uint64_t a_descriptor, b_descriptor;
  int row;  // of the warpgroup's 64, the first
  bool half, accumulate, done;
};

struct WarpProducts {
  std::vector<WgmmaOperation> open;
  std::deque<std::vector<WgmmaOperation>> groups;
  std::vector<std::shared_ptr<Accumulators>> accumulators;
  uint32_t fenced = 0;  // lanes
  size_t issued = 0;
};

// What the four warps of a warpgroup must agree on.
struct WgmmaIssue {
  uint64_t a_descriptor, b_descriptor;
  int columns;
  bool accumulate;
};

struct Cta {
  int threads = 0, live = 0, warps = 0;
  size_t shared_bytes = 0;
  uint32_t ready[32];  // lanes
  uint32_t ready_warps;
  std::vector<Meeting> meetings[32];
  WarpProducts products[32];
  std::vector<WgmmaIssue> issues[8];  // of each warpgroup, by its first warp to come there
  NamedBarrier named[16];
  std::map<uint64_t*, std::vector<Thread*>> barrier_waiters;
  std::vector<AsyncOperation> operations;
  bool failed = false;
  // Of each 16-byte unit, the thread that wrote it through the generic proxy without a fence since, plus one.
  uint16_t unfenced[kMostSharedBytes / 16] = {};
};

extern Random randomness;
extern Cta cta;

// ---- threads (engine.cc)

// The thread that runs stops until it is woken by another's wake().
void wait(const char* what, Where where, uint64_t detail0 = 0, uint64_t detail1 = 0);
void wake(Thread* thread);
Thread* thread_of(int warp, int lane);
// Lets others run; the thread stays ready.
void suspend();

// ---- mbarriers (barriers.cc)

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

bool load_barrier(uint64_t* barrier, BarrierState& state, const char* what);
// Stores the state after an arrival or the completion of bytes.
void finish_phase_if_complete(uint64_t* barrier, BarrierState& state);

// ---- asynchronous operations (copies.cc, wgmma.cc)

void perform(size_t operation);  // of Cta::operations, and removes it
void perform(WgmmaOperation& operation);

// Fails if a thread wrote to these bytes without a fence since.
bool check_fenced(uint32_t address, int bytes, const char* what);

}  // namespace emulator
