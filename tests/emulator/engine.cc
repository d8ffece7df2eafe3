// Runs grids: CTAs one by one, their threads in random order.
#include <pthread.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cta.h"

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Each CUDA thread is a fiber that runs until it waits for something (or until interruption() lets others overtake).
// Whoever makes a wait end marks the thread as ready.

Thread* current = nullptr;
Random randomness;
Cta cta;

extern "C" {
alignas(1024) uint8_t emulator_memory[kMostSharedBytes + kCanaryBytes];
}

void catch_bad_accesses();  // memory.cc

namespace {

constexpr int kMostThreads = 1024;

Settings the_settings;
std::string the_error;

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

// ---- scheduler

bool perform_something() {
  if (!cta.operations.empty()) {
    perform(randomness.below(int(cta.operations.size())));
    return true;
  }
  return false;
}

void perform_some_wgmma() {
  for (WarpProducts& products : cta.products) {
    if (randomness.below(2)) continue;
    for (auto& group : products.groups) {
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
  for (int warp = 0; warp < cta.warps; ++warp) {
    const WarpProducts& products = cta.products[warp];
    if (!products.open.empty() || !products.groups.empty()) return fail("the CTA ended before a wgmma was waited for");
    if (products.issued != cta.issues[warp / 4].size()) return fail("warp %d took no part in a wgmma", warp);
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
    thread.unfenced.clear();
    thread.fiber.prepare(run_thread);
    wake(&thread);
  }
  epoch.steps = 0;
  run_threads();
  check_after_cta();
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

void suspend() { current->fiber.suspend(); }

Thread* thread_of(int warp, int lane) { return pool[32 * warp + lane].get(); }

void wake(Thread* thread) {
  cta.ready[thread->warp] |= 1u << thread->lane;
  cta.ready_warps |= 1u << thread->warp;
}

void wait(const char* what, Where where, uint64_t detail0, uint64_t detail1) {
  Thread* self = current;
  cta.ready[self->warp] &= ~(1u << self->lane);
  if (cta.ready[self->warp] == 0) cta.ready_warps &= ~(1u << self->warp);
  self->waits_for = what;
  self->where = where;
  self->detail[0] = detail0;
  self->detail[1] = detail1;
  suspend();
}

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
