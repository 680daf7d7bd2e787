// An emulated CUDA device: the kernels of csrc/cuda are compiled by a host compiler and run on one CPU thread.
//
// Every CUDA thread is a fibre (ucontext) that yields at barriers, shuffles, votes and atomics. A scheduler resumes
// fibres forwards, backwards or in seeded random order, several clusters of the grid at a time. So code that relies on
// an order that CUDA does not guarantee gives different results. Shared memory is one allocation per block, filled with
// a NaN pattern before the block starts. Under AddressSanitizer its ends are guarded. A launch fails with
// cudaErrorLaunchFailure and a reason if fibres deadlock or run different warp operations.
//
// Not emulated: time, caches, weak memory ordering and concurrency inside one instruction.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// CUDA's host headers define __global__ and similar macros. For a host compiler they must expand to nothing.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace emu {

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}

enum class Order : int { forward = 0, reverse = 1, random = 2 };

// Set by the tests. `resident` clusters run interleaved, as on a device that holds that many at a time.
struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;
  int resident = 2;
  int code_arch = 90;  // architecture the kernels seem compiled for; below 90 a block is its own cluster
  std::string error;   // of the last failed launch
  int64_t launches = 0;
  int64_t memsets = 0;
};

inline Settings& settings() {
  static Settings s;
  return s;
}

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class WarpOp : int { none, shuffle, ballot, sync };

// Synchronises 32 fibres. There are two buffers, so that the fastest lane can store its value for the next operation
// while the slowest lane still reads the values of this one.
struct Warp {
  int lanes = 0;  // number of the block's threads in this warp
  int exited = 0;
  int arrived = 0;
  int64_t generation = 0;
  WarpOp op = WarpOp::none;
  uint64_t values[2][32] = {};
};

struct Barrier {
  int expected = 0;
  int arrived = 0;
  int64_t generation = 0;
  int accumulated[2] = {0, 0};  // result of __syncthreads_or, by generation

  void arrive() {
    if (++arrived == expected) release();
  }
  void release() {
    arrived = 0;
    ++generation;
    accumulated[generation % 2] = 0;
  }
};

struct Block;

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;  // cluster_arrive / cluster_wait
  int live = 0;
};

struct Block {
  Cluster* cluster = nullptr;
  dim3 index;
  int rank = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const void*, std::pair<char*, size_t>> statics;
  char* dynamic = nullptr;

  ~Block() {
    for (auto& item : statics) std::free(item.second.first);
    std::free(dynamic);
  }
};

constexpr size_t kStack = 256 * 1024;

struct Fibre {
  ucontext_t context;
  char* stack = nullptr;
  Block* block = nullptr;
  uint3 thread{};
  int lane = 0;
  Warp* warp = nullptr;
  int64_t cluster_phase = 0;      // cluster barriers this thread has arrived at
  std::function<bool()> blocked;  // empty: the fibre can run
  bool done = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Machine {
  ucontext_t scheduler;
  Fibre* current = nullptr;
  const std::function<void()>* body = nullptr;
  dim3 grid, block;
  size_t shared_bytes = 0;
  uint64_t random = 1;
  std::string failure;
  std::vector<char*> stacks;  // kept between launches, because allocating them would dominate the time
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  void* scheduler_fake = nullptr;
#endif

  ~Machine() {
    for (char* s : stacks) std::free(s);
  }

  uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline Fibre& current() { return *machine().current; }

inline void switch_to_scheduler(Fibre& f, bool last) {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, m.scheduler_stack, m.scheduler_size);
#endif
  (void)last;
  swapcontext(&f.context, &m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &m.scheduler_stack, &m.scheduler_size);
#endif
}

// Lets other fibres run and returns once `ready` is true.
template <typename Ready>
inline void wait_until(Ready ready) {
  Fibre& f = current();
  if (ready()) return;
  f.blocked = [ready] { return !ready(); };
  switch_to_scheduler(f, false);
}

inline void yield() {
  Fibre& f = current();
  f.blocked = nullptr;
  switch_to_scheduler(f, false);
}

[[noreturn]] inline void fail(const std::string& why) {
  Machine& m = machine();
  if (m.failure.empty()) m.failure = why;
  Fibre& f = current();
  f.blocked = [] { return true; };
  for (;;) switch_to_scheduler(f, false);
}

// ---- Warps ----

inline int full_mask_lanes(const Warp& w) { return w.lanes - w.exited; }

inline void release_warp(Warp& w) {
  if (w.arrived > 0 && w.arrived == full_mask_lanes(w)) {
    w.arrived = 0;
    w.op = WarpOp::none;
    ++w.generation;
  }
}

// Stores a lane's value, waits for the rest of the warp and returns the values of all lanes.
inline const uint64_t* meet(WarpOp op, uint64_t value) {
  Fibre& f = current();
  Warp& w = *f.warp;
  if (w.op != WarpOp::none && w.op != op) fail("lanes of a warp wait in different operations");
  w.op = op;
  const int64_t generation = w.generation;
  w.values[generation % 2][f.lane] = value;
  ++w.arrived;
  release_warp(w);
  wait_until([&w, generation] { return w.generation != generation; });
  return w.values[generation % 2];
}

inline void require_full(unsigned mask) {
  if (mask != 0xffffffffu) fail("only full-warp masks are emulated");
  if (current().warp->exited != 0) fail("a full-mask warp operation after lanes have left");
}

template <typename T>
inline uint64_t to_bits(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= 8, "at most 8 bytes travel between lanes");
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
inline T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- Launching ----

inline void enter_fibre() {
  Machine& m = machine();
  Fibre& f = *m.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_size);
#endif
  (*m.body)();
  f.done = true;
  // Barriers do not wait for a thread that has returned.
  ++f.warp->exited;
  release_warp(*f.warp);
  for (Barrier* b : {&f.block->barrier, &f.block->cluster->barrier}) {
    --b->expected;
    if (b->arrived > 0 && b->arrived == b->expected) b->release();
  }
  switch_to_scheduler(f, true);
}

inline void resume(Fibre& f) {
  Machine& m = machine();
  m.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.scheduler_fake, f.stack, kStack);
#endif
  swapcontext(&m.scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.scheduler_fake, nullptr, nullptr);
#endif
}

inline void start_fibre(Fibre& f, size_t slot) {
  Machine& m = machine();
  if (slot >= m.stacks.size()) m.stacks.resize(slot + 1, nullptr);
  if (m.stacks[slot] == nullptr) m.stacks[slot] = static_cast<char*>(std::aligned_alloc(4096, kStack));
  f.stack = m.stacks[slot];
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter_fibre, 0);
}

struct Resident {
  std::unique_ptr<Cluster> cluster;
  std::vector<std::unique_ptr<Fibre>> fibres;
};

inline cudaError_t launch(const std::function<void()>& body, dim3 grid, int threads, int cluster_blocks,
                          size_t shared_bytes, cudaStream_t) {
  Settings& s = settings();
  Machine& m = machine();
  ++s.launches;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (blocks == 0 || threads < 1 || threads > 1024 || cluster_blocks < 1 || cluster_blocks > 8 ||
      grid.x % cluster_blocks != 0 || grid.y > 65535) {
    s.error = "invalid launch configuration";
    return cudaErrorInvalidConfiguration;
  }
  m.body = &body;
  m.grid = grid;
  m.block = dim3(static_cast<unsigned>(threads));
  m.shared_bytes = shared_bytes;
  m.random = s.seed * 2654435761u + 88172645463325252ull;
  m.failure.clear();

  const int64_t clusters = blocks / cluster_blocks;
  std::vector<int64_t> sequence(static_cast<size_t>(clusters));
  std::iota(sequence.begin(), sequence.end(), 0);
  if (s.order == Order::reverse) std::reverse(sequence.begin(), sequence.end());
  if (s.order == Order::random) {
    for (size_t i = sequence.size(); i > 1; --i) std::swap(sequence[i - 1], sequence[m.next_random() % i]);
  }

  std::vector<Resident> residents(static_cast<size_t>(std::min<int64_t>(s.resident, clusters)));
  size_t next = 0;
  const size_t fibres_per_cluster = static_cast<size_t>(cluster_blocks) * static_cast<size_t>(threads);
  const auto place = [&](size_t slot) {
    Resident& r = residents[slot];
    r.fibres.clear();
    r.cluster.reset();
    if (next == sequence.size()) return;
    const int64_t first = sequence[next++] * cluster_blocks;
    r.cluster = std::make_unique<Cluster>();
    r.cluster->barrier.expected = static_cast<int>(fibres_per_cluster);
    for (int k = 0; k < cluster_blocks; ++k) {
      auto b = std::make_unique<Block>();
      const int64_t linear = first + k;
      b->cluster = r.cluster.get();
      b->rank = k;
      b->index = dim3(static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                      static_cast<unsigned>(linear / grid.x / grid.y));
      b->barrier.expected = threads;
      b->warps.resize(static_cast<size_t>((threads + 31) / 32));
      if (shared_bytes > 0) {
        b->dynamic = static_cast<char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
        std::memset(b->dynamic, 0xff, shared_bytes);
      }
      for (int t = 0; t < threads; ++t) {
        auto f = std::make_unique<Fibre>();
        f->block = b.get();
        f->thread.x = static_cast<unsigned>(t);
        f->lane = t % 32;
        f->warp = &b->warps[static_cast<size_t>(t / 32)];
        ++f->warp->lanes;
        start_fibre(*f, slot * fibres_per_cluster + r.fibres.size());
        r.fibres.push_back(std::move(f));
      }
      r.cluster->blocks.push_back(std::move(b));
    }
  };
  for (size_t slot = 0; slot < residents.size(); ++slot) place(slot);

  std::vector<Fibre*> runnable;
  for (;;) {
    // One round: every fibre that can run is resumed once, in the requested order.
    runnable.clear();
    bool any = false;
    for (size_t slot = 0; slot < residents.size(); ++slot) {
      Resident& r = residents[slot];
      if (r.cluster && std::all_of(r.fibres.begin(), r.fibres.end(), [](const auto& f) { return f->done; }))
        place(slot);
      for (auto& f : r.fibres) {
        if (f->done) continue;
        any = true;
        if (!f->blocked || !f->blocked()) runnable.push_back(f.get());
      }
    }
    if (!any) break;
    if (runnable.empty()) {
      if (m.failure.empty()) m.failure = "deadlock: every thread waits";
      break;
    }
    if (s.order == Order::reverse) std::reverse(runnable.begin(), runnable.end());
    if (s.order == Order::random) {
      for (size_t i = runnable.size(); i > 1; --i) std::swap(runnable[i - 1], runnable[m.next_random() % i]);
    }
    for (Fibre* f : runnable) {
      f->blocked = nullptr;
      resume(*f);
      if (!m.failure.empty()) break;
    }
    if (!m.failure.empty()) break;
  }
  if (!m.failure.empty()) {
    s.error = m.failure;
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// ---- Functions that csrc/cuda/device.cuh needs ----

template <typename T>
inline T* shared_variable(const void* key) {
  auto& slot = current().block->statics[key];
  if (slot.first == nullptr) {
    slot.first = static_cast<char*>(std::aligned_alloc(16, (sizeof(T) + 15) / 16 * 16));
    slot.second = sizeof(T);
    std::memset(slot.first, 0xff, sizeof(T));
  }
  return reinterpret_cast<T*>(slot.first);
}

template <typename T>
inline T* dynamic_shared() {
  return reinterpret_cast<T*>(current().block->dynamic);
}

inline bool has_cluster_code() { return settings().code_arch >= 90; }

inline int cluster_size() { return has_cluster_code() ? static_cast<int>(current().block->cluster->blocks.size()) : 1; }
inline int cluster_rank() { return has_cluster_code() ? current().block->rank : 0; }

inline void cluster_arrive() {
  if (!has_cluster_code()) return;
  Fibre& f = current();
  f.cluster_phase = f.block->cluster->barrier.generation + 1;
  f.block->cluster->barrier.arrive();
  yield();
}

inline void cluster_wait() {
  if (!has_cluster_code()) return;
  Fibre& f = current();
  Barrier& b = f.block->cluster->barrier;
  const int64_t phase = f.cluster_phase;
  wait_until([&b, phase] { return b.generation >= phase; });
}

// The address in block 0 of the cluster that corresponds to one in this block's shared memory.
template <typename T>
inline T* leader_copy(T* own) {
  if (!has_cluster_code()) return own;
  Block& b = *current().block;
  Block& leader = *b.cluster->blocks[0];
  for (auto& item : b.statics) {
    char* base = item.second.first;
    const auto offset = reinterpret_cast<char*>(own) - base;
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(item.second.second)) continue;
    auto& slot = leader.statics[item.first];
    if (slot.first == nullptr) fail("distributed shared memory of a block that has not started");
    return reinterpret_cast<T*>(slot.first + offset);
  }
  fail("not an address in shared memory");
}

inline int atomic_add(int* address, int value) {
  yield();  // other threads may come first
  const int old = *address;
  *address = old + value;
  return old;
}

inline float exp2_ftz(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 1.17549435e-38f ? 0.0f : y;
}

inline uint4 load16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("misaligned 16-byte load");
  uint4 v;
  std::memcpy(&v, address, 16);
  return v;
}

inline uint32_t load4(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 4 != 0) fail("misaligned 4-byte load");
  uint32_t v;
  std::memcpy(&v, address, 4);
  return v;
}

inline void store16(void* address, uint4 v) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("misaligned 16-byte store");
  std::memcpy(address, &v, 16);
}

}  // namespace emu

// ---- CUDA's own names ----

#define threadIdx (emu::current().thread)
#define blockIdx (emu::current().block->index)
#define blockDim (emu::machine().block)
#define gridDim (emu::machine().grid)

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  ++emu::settings().memsets;
  std::memset(address, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() {
  emu::Barrier& b = emu::current().block->barrier;
  const int64_t generation = b.generation;
  b.arrive();
  emu::wait_until([&b, generation] { return b.generation != generation; });
}

inline int __syncthreads_or(int predicate) {
  emu::Barrier& b = emu::current().block->barrier;
  const int64_t generation = b.generation;
  b.accumulated[generation % 2] |= predicate != 0;
  b.arrive();
  emu::wait_until([&b, generation] { return b.generation != generation; });
  return b.accumulated[generation % 2];
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emu::require_full(mask);
  emu::meet(emu::WarpOp::sync, 0);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  emu::require_full(mask);
  return emu::from_bits<T>(emu::meet(emu::WarpOp::shuffle, emu::to_bits(value))[source % 32]);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  emu::require_full(mask);
  const int source = emu::current().lane ^ lane_mask;
  return emu::from_bits<T>(emu::meet(emu::WarpOp::shuffle, emu::to_bits(value))[source % 32]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emu::require_full(mask);
  const uint64_t* votes = emu::meet(emu::WarpOp::ballot, predicate != 0);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(votes[i]) << i;
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
