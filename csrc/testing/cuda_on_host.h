#pragma once

// Runs CUDA kernels on the CPU, for tests only: one std::thread per CUDA thread, one block after
// another. It checks indexing, bounds, shared memory, reductions and arithmetic and, with
// sanitizers, also finds races and reads past the end; it says nothing about speed, streams or
// device memory. Include it before kernels, with UNET_FAST_CUDA_ON_HOST defined; it needs no CUDA
// toolkit.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time, so one copy serves all

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_host {

constexpr int kWarp = 32;

// The barriers of one block and the values its lanes exchange.
struct Block {
  explicit Block(int threads) : all(threads), lanes(threads) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<std::barrier<>>(std::min(kWarp, threads - first)));
    }
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> lanes;
};

inline thread_local Block* block = nullptr;
inline thread_local int thread = 0;

}  // namespace cuda_on_host

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_host::block->all.arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) {
  cuda_on_host::block->warps[cuda_on_host::thread / cuda_on_host::kWarp]->arrive_and_wait();
}

// Lanes past the end of the warp read their own value, as on the device.
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::vector<uint64_t>& lanes = cuda_on_host::block->lanes;
  const int thread = cuda_on_host::thread;
  const bool inside = thread % cuda_on_host::kWarp + delta < cuda_on_host::kWarp &&
                      thread + delta < static_cast<int>(lanes.size());
  std::memcpy(&lanes[thread], &value, sizeof(T));
  __syncwarp();
  T result;
  std::memcpy(&result, &lanes[inside ? thread + delta : thread], sizeof(T));
  __syncwarp();
  return result;
}

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

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, Stream, Arguments... arguments) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  Block shared_block(count);
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
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
  for (std::thread& each : threads) each.join();
}

}  // namespace cuda_on_host
