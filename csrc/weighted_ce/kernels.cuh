#pragma once

#include "common/cuda.cuh"
#include "common/layout.h"
#include "weighted_ce/numerics.h"

namespace unet_fast::weighted_ce {

// Pixels of one block and so of one partial sum. Fixed, so that sums repeat bit for bit.
constexpr int64_t kBlockPixels = 2048;

// The operands as pointers. T: logits, A: accumulator, Id: target.
template <typename T, typename A, typename Id>
struct Problem {
  Layout layout;
  const T* logits;
  const Id* target;
  const A* weight;  // or null: weight 1
  int64_t ignore_index;
  int64_t reduction;

  __host__ __device__ int64_t blocks_per_image() const {
    return (layout.pixels + kBlockPixels - 1) / kBlockPixels;
  }
  int64_t blocks() const { return layout.images * blocks_per_image(); }
};

// The pixels of this block: [first, last) of one image.
struct Range {
  int64_t image, first, last;
};

template <typename T, typename A, typename Id>
__device__ Range block_range(const Problem<T, A, Id>& in) {
  const int64_t first = blockIdx.x % in.blocks_per_image() * kBlockPixels;
  const int64_t end = first + kBlockPixels;
  return {blockIdx.x / in.blocks_per_image(), first,
          end < in.layout.pixels ? end : in.layout.pixels};
}

// The sums of all threads of the block, for thread 0; every thread calls it.
__device__ inline Sums block_sum(const Sums& sums) {
  __shared__ double shared[kThreads / kWarp];
  return {unet_fast::block_sum(sums.loss, shared), unet_fast::block_sum(sums.weight, shared),
          unet_fast::block_sum(sums.pixels, shared)};
}

// What a thread knows of its pixel after one pass over the logits.
template <typename A>
struct Pixel {
  int64_t flat;  // index into target, weight and per-pixel losses
  bool counted;
  A weight, largest, sum, target_logit;
  int64_t target;
};

// Reads every logit of a pixel once: when a larger one appears, the sum so far is rescaled.
template <typename T, typename A, typename Id>
__device__ Pixel<A> read_pixel(const Problem<T, A, Id>& in, int64_t image, int64_t pixel) {
  Pixel<A> out{image * in.layout.pixels + pixel, false, A(0), A(0), A(0), A(0), 0};
  const int64_t t = in.target[out.flat];
  out.counted = t != in.ignore_index;
  const bool in_range = t >= 0 && t < in.layout.classes;
  assert((!out.counted || in_range) && "weighted_ce: target must be a class or ignore_index");
  out.counted = out.counted && in_range;
  out.target = out.counted ? t : 0;
  out.weight = !out.counted ? A(0) : in.weight == nullptr ? A(1) : in.weight[out.flat];

  const T* const x = in.logits + in.layout.offset(image, pixel);
  out.largest = static_cast<A>(x[0]);
  out.sum = shifted_exp(out.largest, out.largest);
  out.target_logit = out.largest;
  for (int64_t c = 1; c < in.layout.classes; ++c) {
    const A logit = static_cast<A>(x[c * in.layout.class_stride]);
    const A largest = larger(out.largest, logit);
    out.sum = out.sum * shifted_exp(out.largest, largest) + shifted_exp(logit, largest);
    out.largest = largest;
    if (c == out.target) out.target_logit = logit;
  }
  return out;
}

// Bytes a pixel: C x sizeof(T) + sizeof(Id) + sizeof(A) read; kNone writes sizeof(A).
// Consecutive threads take consecutive pixels.
template <typename T, typename A, typename Id>
__global__ void forward_kernel(Problem<T, A, Id> in, A* loss, Sums* partial) {
  const Range range = block_range(in);
  Sums sums;
  for (int64_t p = range.first + threadIdx.x; p < range.last; p += blockDim.x) {
    const Pixel<A> pixel = read_pixel(in, range.image, p);
    const A ce = cross_entropy(pixel.largest, pixel.sum, pixel.target_logit);
    const A value = weighted(pixel.weight, ce);
    if (in.reduction == kNone) {
      loss[pixel.flat] = value;
    } else {
      sums.add({static_cast<double>(value), static_cast<double>(pixel.weight),
                pixel.counted ? 1.0 : 0.0});
    }
  }
  if (in.reduction == kNone) return;  // the same for all threads, so no barrier is left behind
  sums = block_sum(sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

// One block adds the partial sums, each thread its own in ascending order.
template <typename A>
__global__ void finish_kernel(const Sums* partial, int64_t n, int64_t reduction, A* loss,
                              double* divisor) {
  Sums sums;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sums.add(partial[i]);
  sums = block_sum(sums);
  if (threadIdx.x == 0) {
    *divisor = normaliser(sums, reduction);
    *loss = static_cast<A>(normalised(sums.loss, *divisor));
  }
}

// Recomputes the softmax rather than reading a stored one: the second read of the logits is cached.
// Bytes a pixel: as forward, and C x sizeof(T) written.
template <typename T, typename A, typename Id>
__global__ void backward_kernel(Problem<T, A, Id> in, const A* grad, const double* divisor,
                                Layout out_layout, T* out) {
  const Range range = block_range(in);
  const A scale = in.reduction == kNone ? A(0) : static_cast<A>(normalised(*grad, *divisor));
  for (int64_t p = range.first + threadIdx.x; p < range.last; p += blockDim.x) {
    const Pixel<A> pixel = read_pixel(in, range.image, p);
    const A upstream = in.reduction == kNone ? grad[pixel.flat] : scale;
    const A coefficient = weighted(pixel.weight, upstream);
    const A inverse = inverse_sum(pixel.sum);
    const T* const x = in.logits + in.layout.offset(range.image, p);
    T* const y = out + out_layout.offset(range.image, p);
    for (int64_t c = 0; c < in.layout.classes; ++c) {
      const A shifted = shifted_exp(static_cast<A>(x[c * in.layout.class_stride]), pixel.largest);
      y[c * out_layout.class_stride] =
          static_cast<T>(gradient(shifted, inverse, c == pixel.target, coefficient));
    }
  }
}

/// `partial` holds one Sums per block (unused for kNone). An empty problem still gets its loss, 0.
template <typename T, typename A, typename Id, typename Stream>
void launch_forward(const Problem<T, A, Id>& in, A* loss, double* divisor, Sums* partial,
                    Stream stream) {
  const int64_t blocks = in.blocks();
  if (blocks > 0) {
    launch(forward_kernel<T, A, Id>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream,
           in, loss, partial);
  }
  if (in.reduction != kNone) {
    launch(finish_kernel<A>, dim3(1), dim3(kThreads), stream, static_cast<const Sums*>(partial),
           blocks, in.reduction, loss, divisor);
  }
}

template <typename T, typename A, typename Id, typename Stream>
void launch_backward(const Problem<T, A, Id>& in, const A* grad, const double* divisor,
                     const Layout& out_layout, T* out, Stream stream) {
  launch(backward_kernel<T, A, Id>, dim3(static_cast<unsigned>(in.blocks())), dim3(kThreads),
         stream, in, grad, divisor, out_layout, out);
}

}  // namespace unet_fast::weighted_ce
