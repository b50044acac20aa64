#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda.cuh"
#include "weighted_ce/numerics.h"
#include "weighted_ce/pixels.cuh"

namespace unet_fast::weighted_ce {

// The sums of one block.
struct Partial {
  double loss, total;  // total: of the weights, or for kMean of the pixels not ignored
};

// Where a forward kernel writes, and how its blocks meet: each leaves its sums, and the last one to
// arrive adds them. `arrived` is 0 before and after.
template <typename A>
struct Results {
  A* loss;  // one value, or for kNone one per pixel
  double* divisor;
  Partial* partial;   // one per block; unused for kNone
  unsigned* arrived;  // unused for kNone
};

// The pixels of this block: `pixels` of one image, from `first` on.
struct Block {
  int64_t image, first;
  int pixels;
};

template <typename T, typename A>
__device__ Block block_of(const Problem<T, A>& in) {
  const unsigned per_image = in.blocks_per_image();
  const int64_t first = blockIdx.x % per_image * kBlockPixels;
  const int64_t left = in.layout.pixels - first;
  return {blockIdx.x / per_image, first,
          static_cast<int>(left < kBlockPixels ? left : kBlockPixels)};
}

// Calls fn(pixels, place) for all pixels of this block. Threads that share pixels take part
// together, some of them without any.
template <typename Pixels, typename T, typename A, typename Fn>
__device__ void for_pixels(const Problem<T, A>& in, Fn&& fn) {
  const Block block = block_of(in);
  const T* const x = in.logits + in.layout.offset(block.image, block.first);
  const int64_t flat = block.image * in.layout.pixels + block.first;
  int32_t worst = 0;
  constexpr int kTogether = Pixels::lanes > 1 ? kWarp / Pixels::lanes : 1;
  for (int at = static_cast<int>(threadIdx.x) / Pixels::lanes * Pixels::n;
       at / kTogether * kTogether < block.pixels; at += kThreads / Pixels::lanes * Pixels::n) {
    const Place<T> place{x + at * Pixels::pixel_step(in.layout), flat + at, at, block.pixels - at};
    const Pixels pixels(in, place);
    fn(pixels, place);
    for (int i = 0; i < Pixels::n; ++i) {
      worst = pixels.target[i] < worst ? pixels.target[i] : worst;
    }
  }
  assert(worst > kInvalid && "weighted_ce: target must be a class or ignore_index");
}

// The sum over the warp, the same in all its lanes.
template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

// The sums over a warp of losses and weights, computed in type S. Stores the losses, too, where
// `losses` is not null.
template <typename S, typename Pixels, typename T, typename A>
__device__ Sums warp_sums(const Problem<T, A>& in, A* losses) {
  const bool by_count = in.reduction == kMean;
  S loss(0), total(0);
  for_pixels<Pixels>(in, [&](const Pixels& pixels, const Place<T>& place) {
    if (!pixels.leads()) return;
    A values[Pixels::n];
    for (int i = 0; i < Pixels::n; ++i) {
      const S w = static_cast<S>(pixels.weight[i]);
      const S value = weighted(w, cross_entropy<S>(pixels.softmax(i), pixels.target_logit(i)));
      loss += value;
      total += !by_count ? w : pixels.target[i] >= 0 ? S(1) : S(0);
      values[i] = static_cast<A>(value);
    }
    if (losses != nullptr) store<Pixels::packed>(losses + place.flat, pixels.count, values);
  });
  return {static_cast<double>(warp_sum(loss)), static_cast<double>(warp_sum(total))};
}

// Bytes per pixel: C x sizeof(T) + sizeof(id) + sizeof(A) read; kNone writes sizeof(A). Consecutive
// threads take consecutive pixels.
template <typename Pixels, typename T, typename A>
__global__ void forward_kernel(Problem<T, A> in, Results<A> out) {
  const bool per_pixel = in.reduction == kNone;
  bool exactly = per_pixel || std::is_same_v<A, double>;
  Sums sums;
  if (!exactly) {
    sums = warp_sums<A, Pixels>(in, static_cast<A*>(nullptr));
    exactly = !accurate(sums);
  }
  if (exactly) sums = warp_sums<double, Pixels>(in, per_pixel ? out.loss : nullptr);
  if (per_pixel) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *out.divisor = 1;
    return;
  }
  __shared__ double losses[kThreads / kWarp], totals[kThreads / kWarp];
  __shared__ bool last;
  if (threadIdx.x % kWarp == 0) {
    losses[threadIdx.x / kWarp] = sums.loss;
    totals[threadIdx.x / kWarp] = sums.weight;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Partial block{};
    for (int w = 0; w < kThreads / kWarp; ++w) {
      block.loss += losses[w];
      block.total += totals[w];
    }
    out.partial[blockIdx.x] = block;
    __threadfence();  // the sums are there before the arrival is
    last = atomicAdd(out.arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  Partial all{};
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    all.loss += out.partial[i].loss;
    all.total += out.partial[i].total;
  }
  all.loss = block_sum(all.loss, losses);
  all.total = block_sum(all.total, totals);
  if (threadIdx.x == 0) {
    *out.divisor = normaliser({all.loss, all.total, all.total}, in.reduction);
    *out.loss = static_cast<A>(normalised(all.loss, *out.divisor));
    *out.arrived = 0;
  }
}

// Recomputes the softmax rather than reading a stored one. Bytes per pixel: as in forward_kernel,
// plus C x sizeof(T) written.
template <typename Pixels, typename T, typename A>
__global__ void backward_kernel(Problem<T, A> in, const A* grad, const double* divisor,
                                Layout out_layout, T* out) {
  const bool per_pixel = in.reduction == kNone;
  __shared__ Upstream<A> shared;
  if (threadIdx.x == 0) {
    shared = per_pixel ? Upstream<A>{} : Upstream<A>::of(normalised(*grad, *divisor));
  }
  __syncthreads();
  const Block block = block_of(in);
  T* const y = out + out_layout.offset(block.image, block.first);
  for_pixels<Pixels>(in, [&](const Pixels& pixels, const Place<T>& place) {
    A scale[Pixels::n];
    for (int i = 0; i < Pixels::n; ++i) {
      const A w = pixels.weight[i];
      if (per_pixel) {
        const A u = w != A(0) ? grad[place.flat + i] : A(0);
        scale[i] = gradient_scale(pixels.softmax(i), w * u, u != A(0));
      } else {
        scale[i] = shared.scale(pixels.softmax(i), w);
      }
    }
    T* const there = y + place.at * Pixels::pixel_step(out_layout);
    pixels.differentiate(in, place, scale, out_layout, there);
  });
}

// Whether values of type T can be loaded n at a time from `data` on.
template <int n, typename T>
bool aligned(const T* data, int64_t size = sizeof(T)) {
  return reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(size * n, 16) == 0;
}

// Whether the classes of a pixel, and then the pixels, are neighbours: channels-last.
inline bool interleaved(const Layout& layout) {
  return layout.class_stride == 1 && layout.pixel_stride == layout.classes;
}

// Whether each pack of n neighbouring pixels is contiguous and aligned.
template <int n, typename T>
bool packed(const Layout& layout, const T* data) {
  const bool planes = layout.pixel_stride == 1 && layout.class_stride % n == 0;
  return aligned<n>(data) && layout.pixels % n == 0 && layout.image_stride % n == 0 &&
         (planes || interleaved(layout));
}

template <int n, typename T, typename A>
bool packed(const Problem<T, A>& in) {
  return packed<n>(in.layout, in.logits) && (in.weight == nullptr || aligned<n>(in.weight)) &&
         aligned<n>(static_cast<const char*>(in.target), bytes_of(in.target_type));
}

// The layout in which images of one pixel, or none at all, are one image.
inline Layout merged(const Layout& x) {
  if (x.images * x.pixels == 0) return {1, x.classes, 0, 0, 0, 1};
  return x.pixels == 1 ? Layout{1, x.classes, x.images, 0, x.class_stride, x.image_stride} : x;
}

// Calls fn.operator()<Pixels>() with the way to read pixels that suits the problem, a tensor
// `other` like the logits, and losses (or null).
template <typename T, typename A, typename Fn>
void choose(const Problem<T, A>& in, const Layout& layout, const T* other, const A* losses,
            Fn&& fn) {
  if constexpr (std::is_same_v<T, double>) {
    // Networks compute in less; kernels of their own would take long to compile.
    fn.template operator()<ManyClasses<T, A, false, 1, 1>>();
  } else {
    constexpr int n = kPack<T>;
    const int64_t classes = layout.classes;
    const bool neighbours = interleaved(in.layout) && interleaved(layout);
    const bool packs = classes % n == 0 && in.layout.image_stride % n == 0 &&
                       layout.image_stride % n == 0 && aligned<n>(in.logits) && aligned<n>(other);
    const auto few = [&]<int k>() {
      const bool at_once = packed<n>(in) && packed<n>(layout, other) && aligned<n>(losses) &&
                           interleaved(in.layout) == interleaved(layout);
      !at_once     ? fn.template operator()<FewClasses<T, A, k, Access::kStrided>>()
      : neighbours ? fn.template operator()<FewClasses<T, A, k, Access::kInterleaved>>()
                   : fn.template operator()<FewClasses<T, A, k, Access::kPlanes>>();
    };
    classes == 2      ? few.template operator()<2>()
    : classes == 3    ? few.template operator()<3>()
    : classes == 4    ? few.template operator()<4>()
    : !neighbours     ? fn.template operator()<ManyClasses<T, A, false, 1, 1>>()
    : !packs          ? fn.template operator()<ManyClasses<T, A, true, 1, 4>>()
    : classes < 8 * n ? fn.template operator()<ManyClasses<T, A, true, n, 1>>()
                      : fn.template operator()<ManyClasses<T, A, true, n, 4>>();
  }
}

/// An empty problem still gets its loss, 0.
template <typename T, typename A, typename Stream>
void launch_forward(Problem<T, A> in, const Results<A>& out, Stream stream) {
  in.layout = merged(in.layout);
  const A* const losses = in.reduction == kNone ? out.loss : nullptr;
  choose(in, in.layout, in.logits, losses, [&]<typename Pixels>() {
    launch(forward_kernel<Pixels, T, A>, dim3(static_cast<unsigned>(in.blocks())), dim3(kThreads),
           stream, in, out);
  });
}

template <typename T, typename A, typename Stream>
void launch_backward(Problem<T, A> in, const A* grad, const double* divisor, Layout out_layout,
                     T* out, Stream stream) {
  in.layout = merged(in.layout);
  out_layout = merged(out_layout);
  const T* const gradients = out;
  const A* const none = nullptr;
  choose(in, out_layout, gradients, none, [&]<typename Pixels>() {
    launch(backward_kernel<Pixels, T, A>, dim3(static_cast<unsigned>(in.blocks())), dim3(kThreads),
           stream, in, grad, divisor, out_layout, out);
  });
}

}  // namespace unet_fast::weighted_ce
