#pragma once

// Runs CUDA kernels on the CPU, for tests only, one block after another. The threads of a block
// take turns, each on a stack of its own; with UNET_FAST_HOST_THREADS they are threads of the
// operating system, which is much slower, but lets the thread sanitizer find races. It checks
// indexing, bounds, shared memory, reductions and arithmetic; it says nothing about speed, streams
// or device memory. Include it before kernels, with UNET_FAST_CUDA_ON_HOST defined; it needs no
// CUDA toolkit. With an interpreter set, launches are handed over to that. For nvcc, which compiles
// the same launches to PTX, nothing stands in for CUDA.

#include "testing/device_memory.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace cuda_on_host {
using Stream = cudaStream_t;
}

#else

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time, so one copy serves all

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_host {

constexpr int kWarp = 32;

#ifdef UNET_FAST_HOST_THREADS

using Barrier = std::barrier<>;

/// Calls work(t) for t = 0, ..., count - 1, all at the same time.
inline void run_together(int count, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) threads.emplace_back([&, t] { work(t); });
  for (std::thread& each : threads) each.join();
}

#else

// Threads that take turns: one goes on until it waits or ends.
class Turns {
 public:
  Turns(int count, const std::function<void(int)>& work) : work_(work), contexts_(count) {
    static std::vector<std::unique_ptr<char[]> > stacks;
    while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[kStack]);
    active = this;
    left_ = count;
    for (int t = 0; t < count; ++t) {
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks[t].get();
      contexts_[t].uc_stack.ss_size = kStack;
      makecontext(&contexts_[t], &begin, 0);
    }
    swapcontext(&end_, &contexts_[0]);
  }
  // Lets the next thread go on.
  void pass() {
    const int from = current_;
    do {
      current_ = (current_ + 1) % static_cast<int>(contexts_.size());
    } while (ended(current_));
    if (current_ == from) {
      std::fputs("a barrier that not all threads reach\n", stderr);
      std::abort();
    }
    swapcontext(&contexts_[from], &contexts_[current_]);
  }
  static inline Turns* active = nullptr;

 private:
  static constexpr size_t kStack = 1 << 17;

  static void begin() {
    Turns& turns = *active;
    turns.work_(turns.current_);
    turns.contexts_[turns.current_].uc_stack.ss_sp = nullptr;
    if (--turns.left_ == 0) setcontext(&turns.end_);
    turns.pass();
  }
  bool ended(int t) const { return contexts_[t].uc_stack.ss_sp == nullptr; }

  const std::function<void(int)>& work_;
  std::vector<ucontext_t> contexts_;
  ucontext_t end_;
  int current_ = 0, left_;
};

/// Calls work(t) for t = 0, ..., count - 1, in turns.
inline void run_together(int count, const std::function<void(int)>& work) { Turns(count, work); }

void pass_turn();

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void arrive_and_wait() {
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++passed_;
      return;
    }
    for (const int passed = passed_; passed == passed_;) pass_turn();
  }

 private:
  int count_, arrived_ = 0, passed_ = 0;
};

#endif

// The barriers of one block and the values its lanes exchange.
struct Block {
  explicit Block(int threads) : all(threads), lanes(threads) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Barrier>(std::min(kWarp, threads - first)));
    }
  }
  Barrier all;
  std::vector<std::unique_ptr<Barrier> > warps;
  std::vector<uint64_t> lanes;
};

inline thread_local Block* block = nullptr;
inline thread_local int thread = 0;

}  // namespace cuda_on_host

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#ifndef UNET_FAST_HOST_THREADS
inline void cuda_on_host::pass_turn() {
  const int here = thread;
  const dim3 place = threadIdx;
  Turns::active->pass();
  thread = here;
  threadIdx = place;
}
#endif

inline void __syncthreads() { cuda_on_host::block->all.arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) {
  cuda_on_host::block->warps[cuda_on_host::thread / cuda_on_host::kWarp]->arrive_and_wait();
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

inline void __threadfence() {}  // blocks run one at a time

namespace cuda_on_host {

// The value of lane `from` of this warp. Lanes past its end read their own value, as on the device.
template <typename T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::vector<uint64_t>& lanes = block->lanes;
  const int other = thread / kWarp * kWarp + from;
  const bool inside = from < kWarp && other < static_cast<int>(lanes.size());
  std::memcpy(&lanes[thread], &value, sizeof(T));
  __syncwarp();
  T result;
  std::memcpy(&result, &lanes[inside ? other : thread], sizeof(T));
  __syncwarp();
  return result;
}

}  // namespace cuda_on_host

template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return cuda_on_host::shuffle(value, cuda_on_host::thread % cuda_on_host::kWarp + delta);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_host::shuffle(value, cuda_on_host::thread % cuda_on_host::kWarp ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_host::shuffle(value, lane);
}

// Of a full warp.
inline unsigned __ballot_sync(unsigned, bool vote) {
  std::vector<uint64_t>& lanes = cuda_on_host::block->lanes;
  const int thread = cuda_on_host::thread, first = thread - thread % cuda_on_host::kWarp;
  lanes[thread] = vote ? 1 : 0;
  __syncwarp();
  unsigned result = 0;
  for (int i = 0; i < cuda_on_host::kWarp; ++i)
    result |= static_cast<unsigned>(lanes[first + i]) << i;
  __syncwarp();
  return result;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

template <typename T>
T atomicAdd(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value);
}

template <typename T>
T atomicMax(T* to, T value) {
  const std::atomic_ref<T> at(*to);
  T old = at.load();
  while (old < value && !at.compare_exchange_weak(old, value)) {
  }
  return old;
}

namespace cuda_on_host {

struct Stream {};

/// The symbol of a kernel of this library: nvcc mangles as this compiler does.
inline std::string symbol_of(void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    throw std::runtime_error("a kernel that tests launch must have a symbol");
  }
  return info.dli_sname;
}

template <typename T>
std::vector<unsigned char> bytes_of(const T& x) {
  const auto* const first = reinterpret_cast<const unsigned char*>(&x);
  return {first, first + sizeof(T)};
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, Stream, Arguments... arguments) {
  if (interpreter) {
    interpreter.launch(symbol_of(reinterpret_cast<void*>(kernel)), {grid.x, grid.y, grid.z},
                       {size.x, size.y, size.z}, {bytes_of(static_cast<Parameters>(arguments))...});
    return;
  }
  const int count = static_cast<int>(size.x * size.y * size.z);
  Block shared_block(count);
  run_together(count, [&](int t) {
    block = &shared_block;
    thread = t;
    blockDim = size;
    gridDim = grid;
    threadIdx = dim3(t % size.x, t / size.x % size.y, t / (size.x * size.y));
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          kernel(arguments...);
          shared_block.all.arrive_and_wait();
        }
      }
    }
  });
}

}  // namespace cuda_on_host

#endif
