// Copies to and from shared memory: by tensor maps (TMA) and by threads (cp.async).
#include <algorithm>
#include <cstring>

#include "cta.h"

namespace emulator {
namespace {

void complete_bytes(uint64_t* barrier, int bytes) {
  BarrierState state;
  if (!load_barrier(barrier, state, "completion of a copy")) return;
  state.bytes -= bytes;
  finish_phase_if_complete(barrier, state);
}

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
      // What the TMA writes, nobody else has.
      std::fill_n(&cta.unfenced[(start - kSharedBase) / 16], map.box_bytes() / 16, uint16_t(0));
      complete_bytes(operation.barrier, map.box_bytes());
      break;
    }
    case AsyncOperation::kStore: {
      const uint32_t start = operation.address;
      if (shared_bytes(start, map.box_bytes(), 128, "TMA store") == nullptr) return;
      if (!check_fenced(start, map.box_bytes(), "TMA store")) return;
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

bool check_fenced(uint32_t address, int bytes, const char* what) {
  for (uint32_t unit = (address - kSharedBase) / 16; unit <= (address - kSharedBase + bytes - 1) / 16; ++unit) {
    if (cta.unfenced[unit] != 0) {
      fail("%s reads shared address %u, which thread %d wrote without an async_proxy_fence() since", what,
           unit * 16 + kSharedBase, cta.unfenced[unit] - 1);
      return false;
    }
  }
  return true;
}

void generic_write(int lane, uint32_t address, int bytes) {
  Thread* thread = thread_of(current->warp, lane);
  for (uint32_t unit = (address - kSharedBase) / 16; unit <= (address - kSharedBase + bytes - 1) / 16; ++unit) {
    if (cta.unfenced[unit] != thread->linear + 1) thread->unfenced.push_back(unit);
    cta.unfenced[unit] = uint16_t(thread->linear + 1);
  }
}

void async_proxy_fence() {
  for (const uint32_t unit : current->unfenced) {
    if (cta.unfenced[unit] == current->linear + 1) cta.unfenced[unit] = 0;
  }
  current->unfenced.clear();
}

// ---- TMA

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
  generic_write(current->lane, destination, bytes);
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

}  // namespace emulator
