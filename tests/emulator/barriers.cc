// Barriers: mbarriers and named ones.
#include "cta.h"

namespace emulator {

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

}  // namespace emulator
