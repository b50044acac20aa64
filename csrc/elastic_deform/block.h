#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>

#include "common/simd.h"
#include "elastic_deform/field.h"
#include "elastic_deform/operands.h"

// Blocks of pixels of an output row, which are located, sampled and stored together; part of
// cpu.cpp.
namespace unet_fast::elastic_deform {
namespace {

// Pixels of an output row that are located, then sampled, together: their data stays in the L1
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

// A run of pixels of one output row. Holds their positions first, then the sites to read.
template <typename A>
struct Block {
  int64_t row, begin, size;  // in the output
  Extent rows, columns;
  bool all_read;
  A y[kBlock], x[kBlock];
  int32_t row_of[kBlock], column_of[kBlock];
  A value[kBlock];
  State state[kBlock];
};

// The sites of a block as plain pointers, which compilers analyse better than members.
template <typename A>
struct Sites {
  const int32_t *row, *column;
  const A *y, *x;

  explicit Sites(const Block<A>& block)
      : row(block.row_of), column(block.column_of), y(block.y), x(block.x) {}
};

// A plane of pixels. `row_step` and `column_step` lead to the next pixel that an interpolation
// reads: the strides, or 0 along an axis of one pixel.
template <typename T>
struct Plane {
  const T* data;
  int64_t row, column;  // strides
  int32_t row_step, column_step;

  static Plane of(const T* data, int64_t row, int64_t column, Sides sides) {
    return {data, row, column, sides.rows > 1 ? static_cast<int32_t>(row) : 0,
            sides.columns > 1 ? static_cast<int32_t>(column) : 0};
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
template <typename A>
Extent fold_all(int32_t last, int32_t boundary, Block<A>& block, int32_t* pixel, A* t) {
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

// Interpolates the pixels [begin, end) of a block, whose sites span less than 2^31 elements of the
// plane.
template <int order, typename T, typename A>
UNET_FAST_SIMD void sample(Plane<T> plane, Extent rows, Extent columns, Sites<A> sites,
                           int64_t begin, int64_t end, A* out) {
  const T* const from = plane.data + rows.low * plane.row + columns.low * plane.column -
                        kBefore<order> * (plane.row_step + plane.column_step);
  const int32_t row = static_cast<int32_t>(plane.row), column = static_cast<int32_t>(plane.column);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    A y[kTaps<order>], x[kTaps<order>];
    tap_weights<order>(sites.y[k], y);
    tap_weights<order>(sites.x[k], x);
    int32_t at = (sites.row[k] - rows.low) * row + (sites.column[k] - columns.low) * column;
    if constexpr (order == 0) {
      at += (sites.y[k] >= A(0.5) ? plane.row_step : 0) +
            (sites.x[k] >= A(0.5) ? plane.column_step : 0);
    }
    out[k] = interpolate<order>(y, x, [&](int i, int j) {
      return static_cast<A>(from[at + i * plane.row_step + j * plane.column_step]);
    });
  }
}

// sample<1> for planes with contiguous rows: both neighbours in a row are loaded by one gather.
typedef uint64_t Pair __attribute__((may_alias, aligned(alignof(float))));
UNET_FAST_SIMD void sample_pairs(Plane<float> plane, Extent rows, Extent columns,
                                 Sites<float> sites, int64_t begin, int64_t end, float* out) {
  static_assert(std::endian::native == std::endian::little);
  const float* const from = plane.data + rows.low * plane.row + columns.low;
  const int32_t row = static_cast<int32_t>(plane.row);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    float y[2], x[2];
    tap_weights<1>(sites.y[k], y);
    tap_weights<1>(sites.x[k], x);
    const int32_t at = (sites.row[k] - rows.low) * row + sites.column[k] - columns.low;
    const uint64_t above = *reinterpret_cast<const Pair*>(from + at);
    const uint64_t below = *reinterpret_cast<const Pair*>(from + at + plane.row_step);
    out[k] = interpolate<1>(y, x, [&](int i, int j) {
      return std::bit_cast<float>(static_cast<uint32_t>((i == 0 ? above : below) >> (32 * j)));
    });
  }
}

template <typename T>
auto linear_sampler(const Plane<T>& plane) {
  if constexpr (std::is_same_v<T, float>) {
    if (plane.column_step == 1) return sample_pairs;
  }
  return sample<1, T, Accumulator<T>>;
}

// Reads the nearest labels of the pixels [begin, end) of a block.
template <typename Id, typename A>
UNET_FAST_SIMD void take(Plane<Id> plane, Extent rows, Extent columns, Sites<A> sites,
                         int64_t begin, int64_t end, Id* out) {
  const Id* const from = plane.data + rows.low * plane.row + columns.low * plane.column;
  const int32_t row = static_cast<int32_t>(plane.row), column = static_cast<int32_t>(plane.column);
  UNET_FAST_INDEPENDENT
  for (int64_t k = begin; k < end; ++k) {
    const int32_t at = (sites.row[k] - rows.low) * row + (sites.column[k] - columns.low) * column +
                       (sites.y[k] >= A(0.5) ? plane.row_step : 0) +
                       (sites.x[k] >= A(0.5) ? plane.column_step : 0);
    out[k] = from[at];
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

// Prefetches the cache lines that a block reads, all at once: gathers alone wait for one after the
// other.
template <typename T, typename A>
void prefetch(const Plane<T>& plane, const Block<A>& block) {
  constexpr int64_t step = 64 / sizeof(T) < kBlock ? 64 / sizeof(T) : kBlock;
  for (int64_t k = 0; k < block.size; k += step) {
    const T* const at =
        plane.data + block.row_of[k] * plane.row + block.column_of[k] * plane.column;
    __builtin_prefetch(at);
    __builtin_prefetch(at + plane.row_step);
  }
}

// Calls `fn.operator()<order>()`.
template <typename Fn>
void dispatch_order(int64_t order, Fn&& fn) {
  order == 3   ? fn.template operator()<3>()
  : order == 1 ? fn.template operator()<1>()
               : fn.template operator()<0>();
}

// Calls `work(rows, columns, begin, end)` for parts of a block, nearly always the whole, that span
// less than 2^31 elements of a plane, with the extents of their pixels.
template <typename T, typename A, typename Work>
void for_parts(const Plane<T>& plane, const Block<A>& block, Extent rows, Extent columns,
               int64_t begin, int64_t end, Work&& work) {
  const int64_t span = (int64_t{rows.high} - rows.low + 4) * plane.row +
                       (int64_t{columns.high} - columns.low + 4) * plane.column;
  if (span <= INT32_MAX) return work(rows, columns, begin, end);
  if (end - begin == 1) {
    const int32_t row = block.row_of[begin], column = block.column_of[begin];
    return work(Extent{row, row}, Extent{column, column}, begin, end);
  }
  const int64_t middle = begin + (end - begin) / 2;
  for (const auto& [b, e] : {std::pair{begin, middle}, std::pair{middle, end}}) {
    const auto [top, bottom] = std::minmax_element(block.row_of + b, block.row_of + e);
    const auto [left, right] = std::minmax_element(block.column_of + b, block.column_of + e);
    for_parts(plane, block, Extent{*top, *bottom}, Extent{*left, *right}, b, e, work);
  }
}

}  // namespace
}  // namespace unet_fast::elastic_deform
