#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

// Arithmetic of the field between displacements, and the affine map, on `axes` spatial axes; the
// slowest axis comes first. No torch.
namespace unet_fast::elastic_deform {

// What the field is between the displacements; numbered as in
// unet_fast/contracts/elastic_deform.py.
enum Grid : int32_t { kInterpolating, kApproximating, kKeys };

/// Numbers of pixels along each axis: the size of an array, or the place of a pixel in it.
template <int axes>
struct Sides {
  int64_t along[axes];

  UNET_FAST_HOST_DEVICE int64_t& operator[](int axis) { return along[axis]; }
  UNET_FAST_HOST_DEVICE int64_t operator[](int axis) const { return along[axis]; }
  /// Pixels between neighbours along an axis.
  UNET_FAST_HOST_DEVICE int64_t step(int axis) const {
    int64_t result = 1;
    for (int i = axis + 1; i < axes; ++i) result *= along[i];
    return result;
  }
  UNET_FAST_HOST_DEVICE int64_t pixels() const { return along[0] * step(0); }
  /// Lines along the last axis.
  UNET_FAST_HOST_DEVICE int64_t lines() const { return lines_along(axes - 1); }
  UNET_FAST_HOST_DEVICE int64_t lines_along(int axis) const {
    int64_t result = 1;
    for (int i = 0; i < axes; ++i) result *= i == axis ? 1 : along[i];
    return result;
  }
  /// The index of the first pixel of a line along an axis; lines count on over arrays that follow.
  UNET_FAST_HOST_DEVICE int64_t first_of_line(int axis, int64_t line) const {
    const int64_t s = step(axis);
    return line / s * (s * along[axis]) + line % s;
  }
  UNET_FAST_HOST_DEVICE int64_t index_of(const Sides& place) const {
    int64_t result = place[0];
    for (int axis = 1; axis < axes; ++axis) result = result * along[axis] + place[axis];
    return result;
  }
  /// The place of the pixel with an index; of lines, if the last `left_out` axes are left out.
  UNET_FAST_HOST_DEVICE Sides place_of(int64_t index, int left_out = 0) const {
    Sides result{};
    for (int axis = axes - 1 - left_out; axis > 0; --axis) {
      result[axis] = index % along[axis];
      index /= along[axis];
    }
    result[0] = index;
    return result;
  }
};

/// A cubic polynomial; `at` holds its coefficients by power.
template <typename A>
struct Cubic {
  A at[4];

  UNET_FAST_HOST_DEVICE A operator()(A t) const {
    return ((at[3] * t + at[2]) * t + at[1]) * t + at[0];
  }
  /// The same polynomial as a function of x, where t = from + scale x.
  UNET_FAST_HOST_DEVICE Cubic of(A from, A scale) const {
    const A slope = (3 * at[3] * from + 2 * at[2]) * from + at[1];
    const A bend = 3 * at[3] * from + at[2];
    return {{(*this)(from), slope * scale, bend * scale * scale, at[3] * scale * scale * scale}};
  }
};

/// The field between the second and the third of four neighbouring coefficients, t in [0, 1].
template <typename A>
UNET_FAST_HOST_DEVICE Cubic<A> cubic(int32_t grid, A c0, A c1, A c2, A c3) {
  if (grid == kKeys) {  // R. Keys 1981, with the slope of torch's bicubic interpolation
    constexpr A a = A(-0.75);
    return {{c1, a * (c0 - c2), -2 * a * c0 - (a + 3) * c1 + (2 * a + 3) * c2 + a * c3,
             a * (c0 - c3) + (a + 2) * (c1 - c2)}};
  }
  constexpr A half = A(0.5), sixth = A(1) / 6;
  return {{(c0 + 4 * c1 + c2) * sixth, (c2 - c0) * half, (c0 - 2 * c1 + c2) * half,
           (c3 - c0 + 3 * (c1 - c2)) * sixth}};
}

/// The weight of coefficient k of the four in `cubic`.
template <typename A>
UNET_FAST_HOST_DEVICE A cubic_weight(int32_t grid, int k, A t) {
  return cubic<A>(grid, k == 0, k == 1, k == 2, k == 3)(t);
}

/// One axis of the grid of coefficients: `cells` intervals, cells + 3 coefficients; cell e lies
/// between the coefficients e + 1 and e + 2.
struct GridAxis {
  int64_t cells;
  double scale;  // cells per pixel

  /// The axis of a grid with `points` displacements along it.
  UNET_FAST_HOST_DEVICE static GridAxis of(int32_t grid, int64_t points, double scale) {
    return {grid == kApproximating ? points - 3 : points > 1 ? points - 1 : 1, scale};
  }
  /// Number of coefficients along this axis.
  UNET_FAST_HOST_DEVICE int64_t size() const { return cells + 3; }
  /// The grid coordinate of a pixel, clamped to the grid.
  UNET_FAST_HOST_DEVICE double coordinate(double pixel) const {
    const double g = pixel * scale;
    return g > 0 ? (g < cells ? g : static_cast<double>(cells)) : 0.0;
  }
  UNET_FAST_HOST_DEVICE int64_t cell(double coordinate) const {
    const int64_t e = static_cast<int64_t>(coordinate);
    return e < cells ? e : cells - 1;
  }
  /// The cell of a pixel; -1 before the grid, `cells` behind it. Over pixels of the same run the
  /// field is one polynomial.
  UNET_FAST_HOST_DEVICE int64_t run(double pixel) const {
    const double g = pixel * scale;
    return g < 0 ? -1 : g > cells ? cells : cell(coordinate(pixel));
  }
};

/// The displacement from which coefficient i of an axis with `points` displacements is made.
UNET_FAST_HOST_DEVICE inline int64_t source_point(int32_t grid, int64_t i, int64_t points) {
  if (grid == kApproximating) return i;
  int64_t k = i - 1;
  if (points == 1) return 0;
  if (grid == kKeys) return k < 0 ? 0 : k < points ? k : points - 1;
  k = k < 0 ? -k : k;
  return k < points ? k : 2 * (points - 1) - k;
}

/// The grid of coefficients, and the displacements from which they are made.
template <int axes>
struct GridAxes {
  GridAxis along[axes];
  Sides<axes> points;  // displacements
  int32_t grid;

  UNET_FAST_HOST_DEVICE static GridAxes of(int32_t grid, const Sides<axes>& points,
                                           const double* scales) {
    GridAxes result{{}, points, grid};
    for (int i = 0; i < axes; ++i) result.along[i] = GridAxis::of(grid, points[i], scales[i]);
    return result;
  }
  /// The grid without displacements.
  UNET_FAST_HOST_DEVICE static GridAxes none(int32_t grid) {
    GridAxes result{{}, {}, grid};
    for (int i = 0; i < axes; ++i) {
      result.along[i] = {1, 0.0};
      result.points[i] = 1;
    }
    return result;
  }
  UNET_FAST_HOST_DEVICE const GridAxis& operator[](int axis) const { return along[axis]; }
  /// Numbers of coefficients.
  UNET_FAST_HOST_DEVICE Sides<axes> sizes() const {
    Sides<axes> result;
    for (int i = 0; i < axes; ++i) result[i] = along[i].size();
    return result;
  }
  /// The index of the displacement from which the coefficient at a place is made.
  UNET_FAST_HOST_DEVICE int64_t knot_of(Sides<axes> place) const {
    for (int i = 0; i < axes; ++i) place[i] = source_point(grid, place[i], points[i]);
    return points.index_of(place);
  }
};

// The pole of the cubic B-spline filter, and how far the filter reaches: |pole|^40 < 1e-22.
constexpr double kPole = -0.26794919243112270647;  // sqrt(3) - 2
constexpr int64_t kHorizon = 40;

/// Replaces n values, `stride` apart, by `make(lane, value)`, one after the other. A GPU reads some
/// ahead, as it waits for memory each time.
template <int lanes, typename A, typename Make>
UNET_FAST_HOST_DEVICE inline void replace(A* x, int64_t n, int64_t stride, Make&& make) {
#if defined(__CUDA_ARCH__)
  constexpr int kAhead = 8;
#else
  constexpr int kAhead = 1;
#endif
  for (int64_t k = 0; k < n; k += kAhead, x += kAhead * stride) {
    A values[kAhead][lanes];
    for (int j = 0; j < kAhead && k + j < n; ++j) {
      for (int l = 0; l < lanes; ++l) values[j][l] = x[j * stride + l];
    }
    for (int j = 0; j < kAhead && k + j < n; ++j) {
      for (int l = 0; l < lanes; ++l) x[j * stride + l] = make(l, values[j][l]);
    }
  }
}

/// Turns values, in place, into the coefficients of the cubic B-spline through them, mirrored at
/// the ends (M. Unser, "Splines", IEEE Signal Processing Magazine 16(6), 1999). Takes `lanes` lines
/// side by side, each of n values `stride` apart.
template <int lanes = 1, typename A>
UNET_FAST_HOST_DEVICE inline void prefilter(A* x, int64_t n, int64_t stride) {
  if (n < 2) return;
  A* const last = x + (n - 1) * stride;
  const A pole = static_cast<A>(kPole);
  // The first value: the causal filter over the infinitely mirrored line, that is, the sum of the
  // values times kPole^distance, of those near by and of their mirror images behind the end.
  double to_end = n - 1 < 2 * kHorizon ? 1.0 : 0.0;  // kPole^(n - 1), if that matters
  for (int64_t k = 1; k < n && to_end != 0; ++k) to_end *= kPole;
  A near[lanes] = {}, far[lanes] = {}, state[lanes];
  for (int64_t k = (n - 1 < kHorizon ? n - 1 : kHorizon) - 1; k > 0; --k) {
    for (int l = 0; l < lanes; ++l) near[l] = pole * (near[l] + x[k * stride + l]);
  }
  for (int64_t k = 1; k < n - 1 && to_end != 0; ++k) {
    for (int l = 0; l < lanes; ++l) far[l] = pole * (far[l] + x[k * stride + l]);
  }
  const A norm = static_cast<A>(1 / (1 - to_end * to_end)), end_weight = static_cast<A>(to_end);
  for (int l = 0; l < lanes; ++l) {
    state[l] = norm * (x[l] + near[l] + end_weight * (last[l] + far[l]));
  }
  for (int l = 0; l < lanes; ++l) x[l] = state[l];
  replace<lanes>(x + stride, n - 1, stride,
                 [&](int l, A value) { return state[l] = value + pole * state[l]; });
  const A end = static_cast<A>(6 * kPole / (kPole * kPole - 1));
  for (int l = 0; l < lanes; ++l) {
    last[l] = state[l] = end * (state[l] + pole * last[l - stride]);
  }
  replace<lanes>(last - stride, n - 1, -stride,
                 [&](int l, A value) { return state[l] = pole * (state[l] - 6 * value); });
}

/// The transpose of `prefilter`, in place. With the ends halved its matrix is symmetric.
template <typename A>
UNET_FAST_HOST_DEVICE inline void prefilter_transposed(A* x, int64_t n, int64_t stride) {
  if (n < 2) return;
  A* const last = x + (n - 1) * stride;
  *x *= 2;
  *last *= 2;
  prefilter(x, n, stride);
  *x /= 2;
  *last /= 2;
}

/// Values of float32 or float64, read as float64.
struct Values {
  const void* data;  // or null
  bool single;

  UNET_FAST_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  UNET_FAST_HOST_DEVICE double operator[](int64_t i) const {
    return single ? static_cast<const float*>(data)[i] : static_cast<const double*>(data)[i];
  }
};

/// Maps output pixel x to input position linear x + translation + field(x + shift), in pixels.
template <int axes>
struct Motion {
  double linear[axes][axes];
  double translation[axes];
  double shift[axes];
  int64_t source = 0;  // the image that is read

  /// The motion of an image. `affine` (N, axes, axes + 1), or null for identity; `offset` (N,
  /// axes), or null for 0. `spans_input`: whether the grid spans the input instead of the output.
  UNET_FAST_HOST_DEVICE static Motion of(const Values& affine, const Values& offset,
                                         bool spans_input, int64_t image) {
    Motion m{};
    for (int i = 0; i < axes; ++i) {
      const int64_t line = (axes * image + i) * (axes + 1);
      for (int k = 0; k < axes; ++k) m.linear[i][k] = affine ? affine[line + k] : i == k;
      if (affine) m.translation[i] = affine[line + axes];
      if (offset) m.translation[i] += offset[axes * image + i];
      if (offset && spans_input) m.shift[i] = offset[axes * image + i];
    }
    return m;
  }
  /// One component of a displacement, which the linear part turns if approximating. The components
  /// lie `step` apart.
  UNET_FAST_HOST_DEVICE double moved(int32_t grid, int axis, const double* d, int64_t step) const {
    if (grid != kApproximating) return d[axis * step];
    double sum = linear[axis][0] * d[0];
    for (int k = 1; k < axes; ++k) sum += linear[axis][k] * d[k * step];
    return sum;
  }
  /// The transpose of `moved`.
  UNET_FAST_HOST_DEVICE double moved_transposed(int32_t grid, int axis, const double* d,
                                                int64_t step) const {
    if (grid != kApproximating) return d[axis * step];
    double sum = linear[0][axis] * d[0];
    for (int k = 1; k < axes; ++k) sum += linear[k][axis] * d[k * step];
    return sum;
  }
  /// The affine part of the input position along one axis.
  template <typename Place>
  UNET_FAST_HOST_DEVICE double at(int axis, const Place& place) const {
    double sum = linear[axis][0] * static_cast<double>(place[0]);
    for (int k = 1; k < axes; ++k) sum += linear[axis][k] * static_cast<double>(place[k]);
    return sum + translation[axis];
  }
};

}  // namespace unet_fast::elastic_deform
