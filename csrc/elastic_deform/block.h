#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <utility>

#include "common/simd.h"
#include "elastic_deform/field.h"
#include "elastic_deform/operands.h"

// Blocks of pixels of an output line, which are located, sampled and stored together; part of
// cpu.cpp.
namespace unet_fast::elastic_deform {
namespace {

// Pixels of an output line that are located, then sampled, together: their data stays in the L1
// cache.
constexpr int64_t kBlock = 256;
// Output pixels of a task, about.
constexpr int64_t kPixelsOfTask = 8192;
// Rows or columns that the prefilter of an image processes side by side.
constexpr int kLines = 16;

// The least and the greatest pixel of a block along an axis.
struct Extent {
  int32_t low, high;

  void add(Extent other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
};

template <int axes>
struct Extents {
  Extent along[axes];

  Extent& operator[](int axis) { return along[axis]; }
  Extent operator[](int axis) const { return along[axis]; }
};

// A run of pixels of one output line. Holds their positions first, then the sites to read.
template <typename A, int axes>
struct Block {
  Sides<axes> place;  // of the first pixel, in the output
  int64_t size;
  Extents<axes> extents;
  bool all_read;
  A t[axes][kBlock];
  int32_t pixel[axes][kBlock];
  A value[kBlock];
  State state[kBlock];

  int64_t& begin() { return place[axes - 1]; }
  int64_t begin() const { return place[axes - 1]; }
  Site<A> site(int axis, int64_t k) const { return {pixel[axis][k], t[axis][k]}; }
};

// The sites of a block as plain pointers, which compilers analyse better than members.
template <typename A, int axes>
struct Sites {
  const int32_t* pixel[axes];
  const A* t[axes];

  explicit Sites(const Block<A, axes>& block) {
    for (int axis = 0; axis < axes; ++axis) {
      pixel[axis] = block.pixel[axis];
      t[axis] = block.t[axis];
    }
  }
};

// The pixels of one channel, or labels. Each step leads to the next pixel that an interpolation
// reads: the stride, or 0 along an axis of one pixel.
template <typename T, int axes>
struct Plane {
  const T* data;
  int64_t stride[axes];
  int32_t step[axes];

  static Plane of(const T* data, const Strides<axes>& strides, const Sides<axes>& sides) {
    Plane result{data, {}, {}};
    for (int axis = 0; axis < axes; ++axis) {
      result.stride[axis] = strides.along[axis];
      result.step[axis] = sides[axis] > 1 ? static_cast<int32_t>(strides.along[axis]) : 0;
    }
    return result;
  }
  // The first pixel that an interpolation reads at the lowest pixels of a block.
  template <int order>
  const T* corner(const Extents<axes>& extents) const {
    const T* result = data;
    for (int axis = 0; axis < axes; ++axis) {
      result += extents[axis].low * stride[axis] - kBefore<order> * step[axis];
    }
    return result;
  }
  // Where a pixel of a block lies behind `corner`.
  template <typename A>
  int32_t offset(const Extents<axes>& extents, const Sites<A, axes>& sites, int64_t k) const {
    int32_t result = 0;
    for (int axis = 0; axis < axes; ++axis) {
      result += (sites.pixel[axis][k] - extents[axis].low) * static_cast<int32_t>(stride[axis]);
    }
    return result;
  }
  // From a pixel to the nearest one, for order 0.
  template <typename A>
  int32_t to_nearest(const Sites<A, axes>& sites, int64_t k) const {
    int32_t result = 0;
    for (int axis = 0; axis < axes; ++axis) {
      result += sites.t[axis][k] >= A(0.5) ? step[axis] : 0;
    }
    return result;
  }
};

// Writes the sites of n pixels whose positions along an axis are a polynomial, from argument `from`
// on. Returns the range of their pixels.
template <typename A>
UNET_FAST_SIMD Extent locate(Cubic<A> position, int32_t anchor, int32_t from, int32_t n,
                             int32_t* pixel, A* t) {
  Extent extent{INT32_MAX, INT32_MIN};
  UNET_FAST_INDEPENDENT
  for (int32_t k = 0; k < n; ++k) {
    const Site<A> s = site(position(static_cast<A>(from + k)), anchor);
    pixel[k] = s.pixel;
    t[k] = s.t;
    extent.low = std::min(extent.low, s.pixel);
    extent.high = std::max(extent.high, s.pixel);
  }
  return extent;
}

template <typename A>
UNET_FAST_SIMD Extent reflect_all(int32_t last, int64_t n, int32_t* pixel, A* t) {
  Extent extent{INT32_MAX, INT32_MIN};
  UNET_FAST_INDEPENDENT
  for (int64_t k = 0; k < n; ++k) {
    const Site<A> s = reflect(Site<A>{pixel[k], t[k]}, last);
    pixel[k] = s.pixel;
    t[k] = s.t;
    extent.low = std::min(extent.low, s.pixel);
    extent.high = std::max(extent.high, s.pixel);
  }
  return extent;
}

// Folds positions of any size along one axis.
template <typename A, int axes>
Extent fold_all(int32_t last, int32_t boundary, int axis, Block<A, axes>& block) {
  int32_t* const pixel = block.pixel[axis];
  A* const t = block.t[axis];
  Extent extent{INT32_MAX, INT32_MIN};
  for (int64_t k = 0; k < block.size; ++k) {
    const Site<A> before{pixel[k], t[k]};
    const State state = state_of(before, last, boundary);
    block.state[k] = std::max(block.state[k], state);
    const Site<A> s = state == kRead ? fold(before, last, boundary) : Site<A>{0, 0};
    pixel[k] = s.pixel;
    t[k] = s.t;
    extent.low = std::min(extent.low, s.pixel);
    extent.high = std::max(extent.high, s.pixel);
  }
  return extent;
}

// Elements from the first pixel that an interpolation reads to one at places behind it.
template <int axes, typename... Places>
int32_t step_to(const int32_t (&steps)[axes], Places... places) {
  const int32_t at[]{places...};
  int32_t result = 0;
  for (int axis = 0; axis < axes; ++axis) result += at[axis] * steps[axis];
  return result;
}

// Interpolates the pixels [begin, end) of a block, whose sites span less than 2^31 elements of the
// plane.
template <int order, typename T, typename A, int axes>
UNET_FAST_SIMD void sample(Plane<T, axes> plane, Extents<axes> extents, Sites<A, axes> sites,
                           int64_t begin, int64_t end, A* out) {
  const T* const from = plane.template corner<order>(extents);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    Weights<order, axes, A> w;
    for (int axis = 0; axis < axes; ++axis) tap_weights<order>(sites.t[axis][k], w[axis]);
    int32_t at = plane.offset(extents, sites, k);
    if constexpr (order == 0) at += plane.to_nearest(sites, k);
    out[k] = interpolate<order, axes>(w, w, [&](auto... places) {
      return static_cast<A>(from[at + step_to(plane.step, places...)]);
    });
  }
}

// Two neighbours in a line, loaded at once; the last of the places chooses one of them.
typedef uint64_t Pair __attribute__((may_alias, aligned(alignof(float))));
template <int axes, typename... Places>
float of_pair(const float* from, const int32_t (&steps)[axes], Places... places) {
  static_assert(std::endian::native == std::endian::little);
  int32_t at[]{places...};
  const int32_t half = at[axes - 1];
  at[axes - 1] = 0;
  for (int axis = 0; axis < axes; ++axis) from += at[axis] * steps[axis];
  return std::bit_cast<float>(
      static_cast<uint32_t>(*reinterpret_cast<const Pair*>(from) >> (32 * half)));
}

// sample<1> for planes with contiguous lines: both neighbours in a line are loaded by one gather.
template <int axes>
UNET_FAST_SIMD void sample_pairs(Plane<float, axes> plane, Extents<axes> extents,
                                 Sites<float, axes> sites, int64_t begin, int64_t end, float* out) {
  const float* const from = plane.template corner<1>(extents);
  plane.stride[axes - 1] = 1;
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    Weights<1, axes, float> w;
    for (int axis = 0; axis < axes; ++axis) tap_weights<1>(sites.t[axis][k], w[axis]);
    const int32_t at = plane.offset(extents, sites, k);
    out[k] = interpolate<1, axes>(
        w, w, [&](auto... places) { return of_pair(from + at, plane.step, places...); });
  }
}

template <typename T, int axes>
auto linear_sampler(const Plane<T, axes>& plane) {
  if constexpr (std::is_same_v<T, float>) {
    if (plane.step[axes - 1] == 1) return sample_pairs<axes>;
  }
  return sample<1, T, Accumulator<T>, axes>;
}

// Reads the nearest labels of the pixels [begin, end) of a block.
template <typename Id, typename A, int axes>
UNET_FAST_SIMD void take(Plane<Id, axes> plane, Extents<axes> extents, Sites<A, axes> sites,
                         int64_t begin, int64_t end, Id* out) {
  const Id* const from = plane.template corner<0>(extents);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    out[k] = from[plane.offset(extents, sites, k) + plane.to_nearest(sites, k)];
  }
}

template <typename A>
UNET_FAST_SIMD void apply(Curve<A> curve, int64_t n, A* value) {
  for (int64_t k = 0; k < n; ++k) value[k] = curve(value[k]);
}

template <typename T, typename A>
UNET_FAST_SIMD void store(const A* value, int64_t n, T* out, int64_t stride) {
  if (stride == 1) {
    for (int64_t k = 0; k < n; ++k) out[k] = stored<T>(value[k]);
  } else {
    for (int64_t k = 0; k < n; ++k) out[k * stride] = stored<T>(value[k]);
  }
}

template <typename A>
UNET_FAST_SIMD void prefilter_lines(A* x, int64_t n, int64_t stride) {
  prefilter<kLines>(x, n, stride);
}

template <typename A>
UNET_FAST_SIMD void transpose(const A* from, int64_t rows, int64_t columns, int64_t pitch,
                              int64_t to_pitch, A* to) {
  for (int64_t x = 0; x < columns; ++x) {
    for (int64_t y = 0; y < rows; ++y) to[x * to_pitch + y] = from[y * pitch + x];
  }
}

// Copies what lies one step inside the ends of n neighbours, of `size` values each, to one step
// outside.
template <typename A>
void mirror_ends(A* x, int64_t n, int64_t step, int64_t size) {
  std::copy_n(x + std::min<int64_t>(1, n - 1) * step, size, x - step);
  std::copy_n(x + std::max<int64_t>(n - 2, 0) * step, size, x + n * step);
}

// Prefetches the cache lines that a block reads, all at once: gathers alone wait for one after the
// other.
template <typename T, typename A, int axes>
void prefetch(const Plane<T, axes>& plane, const Block<A, axes>& block) {
  constexpr int64_t step = 64 / sizeof(T) < kBlock ? 64 / sizeof(T) : kBlock;
  for (int64_t k = 0; k < block.size; k += step) {
    const T* at = plane.data;
    for (int axis = 0; axis < axes; ++axis) at += block.pixel[axis][k] * plane.stride[axis];
    for (int lines = 0; lines < 1 << (axes - 1); ++lines) {
      const T* line = at;
      for (int axis = 0; axis < axes - 1; ++axis) line += lines >> axis & 1 ? plane.step[axis] : 0;
      __builtin_prefetch(line);
    }
  }
}

// Calls `fn.operator()<order>()`.
template <typename Fn>
void dispatch_order(int64_t order, Fn&& fn) {
  order == 3   ? fn.template operator()<3>()
  : order == 1 ? fn.template operator()<1>()
               : fn.template operator()<0>();
}

// Calls `work(extents, begin, end)` for parts of a block, nearly always the whole, that span less
// than 2^31 elements of a plane, with the extents of their pixels.
template <typename T, typename A, int axes, typename Work>
void for_parts(const Plane<T, axes>& plane, const Block<A, axes>& block,
               const Extents<axes>& extents, int64_t begin, int64_t end, Work&& work) {
  int64_t span = 0;
  for (int axis = 0; axis < axes; ++axis) {
    span += (int64_t{extents[axis].high} - extents[axis].low + 4) * plane.stride[axis];
  }
  if (span <= INT32_MAX) return work(extents, begin, end);
  const auto extents_of = [&](int64_t b, int64_t e) {
    Extents<axes> result;
    for (int axis = 0; axis < axes; ++axis) {
      const auto [low, high] = std::minmax_element(block.pixel[axis] + b, block.pixel[axis] + e);
      result[axis] = {*low, *high};
    }
    return result;
  };
  if (end - begin == 1) return work(extents_of(begin, end), begin, end);
  const int64_t middle = begin + (end - begin) / 2;
  for (const auto& [b, e] : {std::pair{begin, middle}, std::pair{middle, end}}) {
    for_parts(plane, block, extents_of(b, e), b, e, work);
  }
}

}  // namespace
}  // namespace unet_fast::elastic_deform
