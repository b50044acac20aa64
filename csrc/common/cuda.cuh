#pragma once

// The launch and index helpers of the CUDA kernels; no torch, so that kernels also run in tests on
// a machine without a GPU (csrc/testing/cuda_on_host.h stands in for the CUDA runtime there).
#if defined(UNET_FAST_CUDA_ON_HOST)
#include "testing/cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace unet_fast {

/// Threads per block of the one-dimensional kernels; a multiple of the warp size.
constexpr int kThreads = 256;
constexpr int kWarp = 32;

#if defined(UNET_FAST_CUDA_ON_HOST)
using cuda_on_host::launch;
#else
/// Starts `kernel` on `stream`; throws if the launch was refused.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
            Arguments... arguments) {
  // clang-format off: it splits the launch brackets
  kernel<<<grid, block, 0, stream>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("unet_fast: CUDA launch failed: ") +
                             cudaGetErrorString(error));
  }
}
#endif

/// The index of this thread in a launch of blocks_of(n); threads with an index >= n have no work.
__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// The number of blocks of kThreads that hold `threads` threads.
inline dim3 blocks_of(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
}

template <typename T>
__global__ void clear(T* values, int64_t n) {
  const int64_t i = thread_index();
  if (i < n) values[i] = 0;
}

/// The sum of `value` over the block, in a fixed order. Every thread must call it; only thread 0
/// gets the sum. `shared` holds one value per warp.
template <typename T>
__device__ T block_sum(T value, T* shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(~0u, value, offset);
  }
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  T total = T(0);
  if (threadIdx.x == 0) {
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += shared[w];
  }
  __syncthreads();  // `shared` may be used again
  return total;
}

}  // namespace unet_fast
