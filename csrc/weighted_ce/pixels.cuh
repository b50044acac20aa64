#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/layout.h"
#include "common/types.h"
#include "weighted_ce/numerics.h"

// How threads read the operands and write the gradient.
namespace unet_fast::weighted_ce {

// Pixels per block and so per partial sum. Fixed, so that sums repeat bit for bit.
constexpr int64_t kBlockPixels = 2048;
// Up to this many classes, logits stay in registers, so that the backward pass reads them once.
constexpr int kFewClasses = 4;
// Values that a thread reads or writes at once where the layout allows it: 16 bytes, or two times
// 16 of double.
template <typename T>
constexpr int kPack = sizeof(T) == 2 ? 8 : 4;

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

  // At least 1, so that a problem without pixels also gets a loss.
  __host__ __device__ unsigned blocks_per_image() const {
    const int64_t blocks = (layout.pixels + kBlockPixels - 1) / kBlockPixels;
    return blocks > 0 ? static_cast<unsigned>(blocks) : 1;
  }
  int64_t blocks() const { return std::max<int64_t>(layout.images, 1) * blocks_per_image(); }
};

template <typename T, int n>
struct Pack {
  T at[n];
};

// The same bytes in words that one instruction each loads or stores. __ldg and __stwb see to it;
// plain stores of whole words came out of nvcc in pieces.
template <typename T, int n>
struct Words {
  static constexpr int kBytes = sizeof(T) * n;
  using Word = std::conditional_t<kBytes % 16 == 0, uint4,
                                  std::conditional_t<kBytes % 8 == 0, uint2, unsigned>>;
  static constexpr int kCount = kBytes / sizeof(Word);
  Word at[kCount];
};

// Loads n values, at once or one by one, `stride` apart. Of the latter, those from `count` on are
// 0.
template <bool at_once, int n, typename T, typename To>
__device__ void load(const T* from, int count, To (&to)[n], int64_t stride = 1) {
  if constexpr (at_once) {
    using W = Words<T, n>;
    W words;
    for (int i = 0; i < W::kCount; ++i) {
      words.at[i] = __ldg(reinterpret_cast<const typename W::Word*>(from) + i);
    }
    const auto pack = __builtin_bit_cast(Pack<T, n>, words);
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(pack.at[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = i < count ? static_cast<To>(from[i * stride]) : To(0);
  }
}

template <bool at_once, int n, typename T>
__device__ void store(T* to, int count, const T (&values)[n], int64_t stride = 1) {
  if constexpr (at_once) {
    using W = Words<T, n>;
    Pack<T, n> pack;
    for (int i = 0; i < n; ++i) pack.at[i] = values[i];
    const W words = __builtin_bit_cast(W, pack);
    for (int i = 0; i < W::kCount; ++i) {
      __stwb(reinterpret_cast<typename W::Word*>(to) + i, words.at[i]);
    }
  } else {
    for (int i = 0; i < n; ++i) {
      if (i < count) to[i * stride] = values[i];
    }
  }
}

// The logit of a class that does not exist.
template <typename A>
constexpr A kImpossible = -std::numeric_limits<A>::infinity();

// Instead of the class of a pixel.
constexpr int32_t kIgnored = -1, kInvalid = -2;

// The targets of n adjacent pixels; those from `count` on are kIgnored.
template <bool at_once, int n, typename T, typename A>
__device__ void load_targets(const Problem<T, A>& in, int64_t flat, int count, int32_t (&to)[n]) {
  const auto load_as = [&]<typename Id>() {
    Id ids[n];
    load<at_once>(static_cast<const Id*>(in.target) + flat, count, ids);
    for (int i = 0; i < n; ++i) {
      const int64_t t = ids[i];
      const bool in_range = static_cast<uint64_t>(t) < static_cast<uint64_t>(in.layout.classes);
      const bool exists = at_once || i < count;
      to[i] = t == in.ignore_index || !exists ? kIgnored
              : in_range                      ? static_cast<int32_t>(t)
                                              : kInvalid;
    }
  };
  switch (in.target_type) {
    case IntegerType::kUint8:
      return load_as.template operator()<uint8_t>();
    case IntegerType::kInt16:
      return load_as.template operator()<int16_t>();
    case IntegerType::kInt32:
      return load_as.template operator()<int32_t>();
    default:
      return load_as.template operator()<int64_t>();
  }
}

// The weights of n adjacent pixels, before it is known which are ignored.
template <bool at_once, int n, typename T, typename A>
__device__ void load_weights(const Problem<T, A>& in, int64_t flat, int count, A (&to)[n]) {
  if (in.weight != nullptr) {
    load<at_once>(in.weight + flat, count, to);
  } else {
    for (int i = 0; i < n; ++i) to[i] = A(1);
  }
}

// Where a thread finds its pixels.
template <typename T>
struct Place {
  const T* x;    // the logits of the first one
  int64_t flat;  // its index in target, weight and losses
  int at;        // and in the block
  int left;      // pixels of the block from it on
};

// Both kinds of pixels below have:
//   n                 pixels of a thread
//   lanes             neighbouring threads that share them; all call the constructor together
//   pixel_step        distance of pixels in memory
//   weight, target    of each; 0 and negative where ignored
//   leads, count      whether this thread answers for the pixels, and how many of them exist
//   softmax, target_logit, differentiate

enum class Access {
  kPlanes,       // packs of pixels of one class
  kInterleaved,  // channels-last: the classes of a pixel are neighbours; packs of both
  kStrided,      // one by one
};

// Adjacent pixels of 2 to kFewClasses classes, their logits in registers.
template <typename T, typename A, int classes, Access access>
struct FewClasses {
  static constexpr int n = kPack<T>, lanes = 1;
  static constexpr bool packed = access != Access::kStrided;

  static __device__ auto pixel_step(const Layout& layout) {
    if constexpr (packed) {
      return access == Access::kPlanes ? 1 : classes;
    } else {
      return layout.pixel_stride;
    }
  }

  __device__ FewClasses(const Problem<T, A>& in, const Place<T>& place) : count(place.left) {
    // Memory is waited for once: all loads are under way before the first value is looked at.
    T logits[classes][n];
    for (int k = 0; k < classes; ++k) {
      load<packed>(place.x + k * pack_step(in.layout), count, logits[k], in.layout.pixel_stride);
    }
    load_weights<packed>(in, place.flat, count, weight);
    load_targets<packed>(in, place.flat, count, target);
    for (int i = 0; i < n; ++i) {
      weight[i] = target[i] >= 0 ? weight[i] : A(0);
      for (int c = 0; c < classes; ++c) terms[i].x[c] = static_cast<A>(at(logits, i, c));
      terms[i].exponentiate();
    }
  }

  __device__ bool leads() const { return true; }
  __device__ const Softmax<A>& softmax(int i) const { return terms[i].softmax; }
  __device__ A target_logit(int i) const {
    A x = terms[i].x[0];
    for (int c = 1; c < classes; ++c) x = c == target[i] ? terms[i].x[c] : x;
    return x;
  }

  // Stores the gradients of all pixels, given the factor of each.
  __device__ void differentiate(const Problem<T, A>&, const Place<T>&, const A (&scale)[n],
                                const Layout& layout, T* y) const {
    T values[classes][n];
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < classes; ++c) {
        at(values, i, c) =
            static_cast<T>(gradient(terms[i].softmax, terms[i].term[c], c == target[i], scale[i]));
      }
    }
    for (int k = 0; k < classes; ++k) {
      store<packed>(y + k * pack_step(layout), count, values[k], layout.pixel_stride);
    }
  }

  int count;
  A weight[n];
  int32_t target[n];

 private:
  // Distance of the packs that hold the pixels.
  static __device__ auto pack_step(const Layout& layout) {
    if constexpr (access == Access::kInterleaved) {
      return n;
    } else {
      return layout.class_stride;
    }
  }

  // Class c of pixel i in the packs.
  template <typename Value>
  static __device__ Value& at(Value (&packs)[classes][n], int i, int c) {
    const int place = access == Access::kInterleaved ? i * classes + c : c * n + i;
    return packs[place / n][place % n];
  }

  FewTerms<A, classes> terms[n];
};

// A pixel shared by `lanes` threads. Each takes `width` classes at a time, loaded at once if there
// are several. `neighbours`: the classes are neighbours in memory. The backward pass reads the
// logits again, from a cache.
template <typename T, typename A, bool neighbours, int width, int lanes_>
struct ManyClasses {
  static constexpr int n = 1, lanes = lanes_;
  static constexpr bool packed = false;

  static __device__ int64_t pixel_step(const Layout& layout) { return layout.pixel_stride; }

  __device__ ManyClasses(const Problem<T, A>& in, const Place<T>& place)
      : count(place.left > 0 ? 1 : 0) {
    load_weights<false>(in, place.flat, count, weight);
    load_targets<false>(in, place.flat, count, target);
    weight[0] = target[0] >= 0 ? weight[0] : A(0);
    x_t = target[0] >= 0 ? static_cast<A>(place.x[target[0] * class_step(in.layout)]) : A(0);
    RunningTerms<A> terms;
    for_classes(in, place.x, [&]<int g>(int, const A(&values)[g], int) { terms.add(values); });
    A m = terms.m;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(~0u, m, offset);
      m = other > m ? other : m;
    }
    terms.raise(m);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      terms.rest += __shfl_xor_sync(~0u, terms.rest, offset);
      terms.largest += __shfl_xor_sync(~0u, terms.largest, offset);
    }
    all = terms.softmax();
  }

  __device__ bool leads() const { return threadIdx.x % lanes == 0; }
  __device__ const Softmax<A>& softmax(int) const { return all; }
  __device__ A target_logit(int) const { return x_t; }

  __device__ void differentiate(const Problem<T, A>& in, const Place<T>& place, const A (&scale)[n],
                                const Layout& layout, T* y) const {
    const A e_t = exp_nonpositive(x_t - all.largest);
    const T of_target = static_cast<T>(gradient(all, e_t, true, scale[0]));
    for_classes(in, place.x, [&]<int g>(int first, const A(&values)[g], int inside) {
      T result[g];
      for (int i = 0; i < g; ++i) {
        const A e = exp_nonpositive(values[i] - all.largest);
        const T other = static_cast<T>(gradient(all, e, false, scale[0]));
        result[i] = first + i * kHop == target[0] ? of_target : other;
      }
      const auto step = class_step(layout);
      store<(width > 1)>(y + first * step, inside, result, kHop * step);
    });
  }

  int count;
  A weight[1];
  int32_t target[1];

 private:
  // Classes that a thread takes at a time, and their distance: enough to have several loads under
  // way.
  static constexpr int kGroup = width > 1        ? width
                                : sizeof(A) == 8 ? 2
                                                 : 8,
                       kHop = width > 1 ? 1 : lanes;

  static __device__ auto class_step(const Layout& layout) {
    if constexpr (neighbours) {
      return 1;
    } else {
      return layout.class_stride;
    }
  }

  // Calls fn(first class, logits, how many of them exist) for groups of logits. The rest comes in
  // smaller groups, so that less is computed of what does not exist, -inf.
  template <typename Fn>
  __device__ void for_classes(const Problem<T, A>& in, const T* x, Fn&& fn) const {
    const int classes = count > 0 ? static_cast<int>(in.layout.classes) : 0;
    const auto step = class_step(in.layout);
    const auto take = [&]<int g>(int first, int inside) {
      T logits[g];
      load<(width > 1)>(x + first * step, inside, logits, kHop * step);
      A values[g];
      for (int i = 0; i < g; ++i) {
        values[i] = i < inside ? static_cast<A>(logits[i]) : kImpossible<A>;
      }
      fn.template operator()<g>(first, values, inside);
    };
    int first = static_cast<int>(threadIdx.x) % lanes * width;
    for (; first + (kGroup - 1) * kHop < classes; first += lanes * kGroup) {
      take.template operator()<kGroup>(first, kGroup);
    }
    if constexpr (width == 1) {
      constexpr int kRest = lanes > 1 ? kGroup : kGroup / 2;
      for (; first < classes; first += lanes * kRest) {
        take.template operator()<kRest>(first, (classes - first + kHop - 1) / kHop);
      }
    }
  }

  A x_t;
  Softmax<A> all;
};

}  // namespace unet_fast::weighted_ce
