#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/layout.h"
#include "common/types.h"
#include "weighted_ce/numerics.h"

namespace unet_fast::weighted_ce {

// Pixels per block and so per partial sum. Fixed, so that sums repeat bit for bit.
constexpr int64_t kBlockPixels = 2048;
// Up to this many classes, logits stay in registers, so that the backward pass reads them once.
constexpr int kFewClasses = 4;
// Pixels that a thread reads at once where the layout allows it.
constexpr int kPack = 4;

// The operands as pointers. T: type of the logits; A: type of arithmetic.
template <typename T, typename A>
struct Problem {
  Layout layout;
  const T* logits;
  const void* target;
  IntegerType target_type;
  const A* weight;  // or null: weight 1
  int64_t ignore_index;
  int64_t reduction;

  __host__ __device__ int64_t blocks_per_image() const {
    return (layout.pixels + kBlockPixels - 1) / kBlockPixels;
  }
  int64_t blocks() const { return layout.images * blocks_per_image(); }
};

// `n` adjacent values, loaded or stored at once.
template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

template <int n, typename T>
__device__ Pack<T, n> load(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

template <int n, typename T>
__device__ void store(T* to, const Pack<T, n>& values) {
  *reinterpret_cast<Pack<T, n>*>(to) = values;
}

template <int n, typename Id>
__device__ Pack<int64_t, n> load_ids_as(const void* data, int64_t first) {
  const Pack<Id, n> ids = load<n>(static_cast<const Id*>(data) + first);
  Pack<int64_t, n> result;
  for (int i = 0; i < n; ++i) result.at[i] = static_cast<int64_t>(ids.at[i]);
  return result;
}

template <int n>
__device__ Pack<int64_t, n> load_ids(const void* data, IntegerType type, int64_t first) {
  switch (type) {
    case IntegerType::kUint8:
      return load_ids_as<n, uint8_t>(data, first);
    case IntegerType::kInt16:
      return load_ids_as<n, int16_t>(data, first);
    case IntegerType::kInt32:
      return load_ids_as<n, int32_t>(data, first);
    default:
      return load_ids_as<n, int64_t>(data, first);
  }
}

// The pixels of this block: [first, last) of one image.
struct Range {
  int64_t image, first, last;
};

template <typename T, typename A>
__device__ Range block_range(const Problem<T, A>& in) {
  const int64_t first = blockIdx.x % in.blocks_per_image() * kBlockPixels;
  const int64_t end = first + kBlockPixels;
  return {blockIdx.x / in.blocks_per_image(), first,
          end < in.layout.pixels ? end : in.layout.pixels};
}

// The sums over all threads of the block, for thread 0. Every thread must call it.
__device__ inline Sums block_sum(const Sums& sums) {
  __shared__ double shared[kThreads / kWarp];
  return {unet_fast::block_sum(sums.loss, shared), unet_fast::block_sum(sums.weight, shared),
          unet_fast::block_sum(sums.pixels, shared)};
}

// State of a thread's n adjacent pixels after one pass over their logits. `few`: there are at most
// kFewClasses classes, and `logits` keeps them.
template <typename T, typename A, int n, bool few>
struct Pixels {
  __device__ Pixels(const Problem<T, A>& in, int64_t image, int64_t first)
      : flat(image * in.layout.pixels + first), weight{} {
    read_targets(in);
    const T* const x = in.logits + in.layout.offset(image, first);
    if constexpr (few) {
#pragma unroll
      for (int c = 0; c < kFewClasses; ++c) {
        if (c < in.layout.classes) logits[c] = load<n>(x + c * in.layout.class_stride);
      }
#pragma unroll
      for (int c = 0; c < kFewClasses; ++c) {
        if (c < in.layout.classes) add(c, logits[c]);
      }
    } else {
#pragma unroll 4
      for (int64_t c = 0; c < in.layout.classes; ++c) {
        add(c, load<n>(x + c * in.layout.class_stride));
      }
    }
  }

  // The sums of the pixels' losses and weights, computed in type S.
  template <typename S>
  __device__ Sums sums() const {
    S loss(0), total(0);
    int counted = 0;
    for (int i = 0; i < n; ++i) {
      const S w = static_cast<S>(weight.at[i]);
      loss += weighted(w, cross_entropy<S>(softmax[i], target_logit[i]));
      total += w;
      counted += target[i] >= 0;
    }
    return {static_cast<double>(loss), static_cast<double>(total), static_cast<double>(counted)};
  }

  int64_t flat;  // index of the first pixel in target, weight and per-pixel losses
  Pack<A, n> weight;
  int32_t target[n];  // -1 where ignored
  std::conditional_t<few, Softmax<A>, LongSoftmax<A>> softmax[n];
  A target_logit[n];
  Pack<T, n> logits[few ? kFewClasses : 1];

 private:
  __device__ void read_targets(const Problem<T, A>& in) {
    const Pack<int64_t, n> ids = load_ids<n>(in.target, in.target_type, flat);
    if (in.weight != nullptr) weight = load<n>(in.weight + flat);
    for (int i = 0; i < n; ++i) {
      const int64_t t = ids.at[i];
      const bool ignored = t == in.ignore_index;
      const bool in_range = t >= 0 && t < in.layout.classes;
      assert((ignored || in_range) && "weighted_ce: target must be a class or ignore_index");
      const bool counted = in_range && !ignored;
      target[i] = counted ? static_cast<int32_t>(t) : -1;
      weight.at[i] = !counted ? A(0) : in.weight == nullptr ? A(1) : weight.at[i];
    }
  }

  __device__ void add(int64_t c, const Pack<T, n>& values) {
    for (int i = 0; i < n; ++i) {
      const A x = static_cast<A>(values.at[i]);
      if (c == 0) {
        softmax[i] = softmax[i].of(x);
        target_logit[i] = x;
      } else {
        softmax[i].add(x);
        target_logit[i] = c == target[i] ? x : target_logit[i];
      }
    }
  }
};

// Bytes per pixel: C x sizeof(T) + sizeof(id) + sizeof(A) read; kNone writes sizeof(A). Consecutive
// threads take consecutive pixels.
template <typename T, typename A, int n, bool few>
__global__ void forward_kernel(Problem<T, A> in, A* loss, double* divisor, Sums* partial) {
  const Range range = block_range(in);
  Sums sums;
  for (int64_t p = range.first + threadIdx.x * n; p < range.last; p += blockDim.x * n) {
    const Pixels<T, A, n, few> pixels(in, range.image, p);
    if (in.reduction == kNone) {
      Pack<A, n> values;
      for (int i = 0; i < n; ++i) {
        values.at[i] = pixel_loss(pixels.weight.at[i], pixels.softmax[i], pixels.target_logit[i]);
      }
      store(loss + pixels.flat, values);
    } else {
      sums.add(accurate_sums<A>([&]<typename S>() { return pixels.template sums<S>(); }));
    }
  }
  if (in.reduction == kNone) {  // the same for all threads, so none is left at a barrier
    if (blockIdx.x == 0 && threadIdx.x == 0) *divisor = 1;
    return;
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

// Adds the partial sums in one block; each thread adds its own in ascending order.
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

// Recomputes the softmax rather than reading a stored one. With more than kFewClasses classes the
// logits are read twice, the second time from a cache. Bytes per pixel: as in forward_kernel, plus
// C x sizeof(T) written.
template <typename T, typename A, int n, bool few>
__global__ void backward_kernel(Problem<T, A> in, const A* grad, const double* divisor,
                                Layout out_layout, T* out) {
  const Range range = block_range(in);
  const double common = in.reduction == kNone ? 0.0 : normalised(*grad, *divisor);
  for (int64_t p = range.first + threadIdx.x * n; p < range.last; p += blockDim.x * n) {
    const Pixels<T, A, n, few> pixels(in, range.image, p);
    A scale[n];
    for (int i = 0; i < n; ++i) {
      const double u = in.reduction == kNone ? static_cast<double>(grad[pixels.flat + i]) : common;
      scale[i] = gradient_scale(pixels.softmax[i], pixels.weight.at[i], u);
    }
    const T* const x = in.logits + in.layout.offset(range.image, p);
    T* const y = out + out_layout.offset(range.image, p);
    const auto differentiate = [&](int64_t c, const Pack<T, n>& logits) {
      Pack<T, n> values;
      for (int i = 0; i < n; ++i) {
        const A e = exp_nonpositive(static_cast<A>(logits.at[i]) - pixels.softmax[i].largest);
        const bool is_target = c == pixels.target[i];
        values.at[i] = static_cast<T>(gradient(pixels.softmax[i], e, is_target, scale[i]));
      }
      store(y + c * out_layout.class_stride, values);
    };
    if constexpr (few) {
#pragma unroll
      for (int c = 0; c < kFewClasses; ++c) {
        if (c < in.layout.classes) differentiate(c, pixels.logits[c]);
      }
    } else {
#pragma unroll 4
      for (int64_t c = 0; c < in.layout.classes; ++c) {
        differentiate(c, load<n>(x + c * in.layout.class_stride));
      }
    }
  }
}

template <int n, typename T>
bool aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * n) == 0;
}

// Whether each pack of n neighbouring pixels is contiguous and aligned.
template <int n, typename T>
bool packed(const Layout& layout, const T* data) {
  return aligned<n>(data) && layout.pixel_stride == 1 && layout.pixels % n == 0 &&
         layout.class_stride % n == 0 && layout.image_stride % n == 0;
}

template <int n, typename T, typename A>
bool packed(const Problem<T, A>& in) {
  const int64_t id_bytes = bytes_of(in.target_type);
  return packed<n>(in.layout, in.logits) && (in.weight == nullptr || aligned<n>(in.weight)) &&
         reinterpret_cast<uintptr_t>(in.target) % (id_bytes * n) == 0;
}

/// `partial` holds one Sums per block (unused for kNone). An empty problem still gets its loss, 0.
template <typename T, typename A, typename Stream>
void launch_forward(const Problem<T, A>& in, A* loss, double* divisor, Sums* partial,
                    Stream stream) {
  const int64_t blocks = in.blocks();
  const bool few = in.layout.classes <= kFewClasses;
  const auto kernel = !few ? forward_kernel<T, A, 1, false>
                      : packed<kPack>(in) && aligned<kPack>(loss)
                          ? forward_kernel<T, A, kPack, true>
                          : forward_kernel<T, A, 1, true>;
  if (blocks > 0) {
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, in, loss, divisor,
           partial);
  }
  if (in.reduction != kNone) {
    launch(finish_kernel<A>, dim3(1), dim3(kThreads), stream, static_cast<const Sums*>(partial),
           blocks, in.reduction, loss, divisor);
  }
}

template <typename T, typename A, typename Stream>
void launch_backward(const Problem<T, A>& in, const A* grad, const double* divisor,
                     const Layout& out_layout, T* out, Stream stream) {
  const bool few = in.layout.classes <= kFewClasses;
  const auto kernel = !few ? backward_kernel<T, A, 1, false>
                      : packed<kPack>(in) && packed<kPack>(out_layout, out)
                          ? backward_kernel<T, A, kPack, true>
                          : backward_kernel<T, A, 1, true>;
  launch(kernel, dim3(static_cast<unsigned>(in.blocks())), dim3(kThreads), stream, in, grad,
         divisor, out_layout, out);
}

}  // namespace unet_fast::weighted_ce
