#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/host_device.h"
#include "common/types.h"

// Arithmetic of the elastic deformation, for one axis where possible; no torch.
namespace unet_fast::elastic_deform {

// What lies outside the input; numbered as in unet_fast/contracts/elastic_deform.py.
enum Boundary : int32_t { kMirror, kConstant, kNearest, kWrap };
// What the field is between the displacements; numbered as in the same file.
enum Grid : int32_t { kInterpolating, kApproximating, kKeys };

// Positions farther than this many pixels, 2^30, are treated like those that are not finite.
constexpr int32_t kFarthest = 1 << 30;
// The pixel of a position that is too far or not finite.
constexpr int32_t kNowhere = INT32_MIN + 1;
constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();

/// Height and width.
struct Sides {
  int64_t rows, columns;

  UNET_FAST_HOST_DEVICE int64_t pixels() const { return rows * columns; }
};

/// Strides of an image or, with one channel, of labels; in elements.
struct Strides {
  int64_t image, channel, row, column;
};

/// Strides of the spline coefficients of images, (N, channels, rows + 2, columns + 2); offsets
/// count from the first pixel inside the border.
inline Strides smooth_strides(Sides sides, int64_t channels) {
  const int64_t pitch = sides.columns + 2, plane = (sides.rows + 2) * pitch;
  return {channels * plane, plane, pitch, 1};
}

/// Pixels of the output above and left of a window in its centre.
UNET_FAST_HOST_DEVICE inline Sides margin_of(Sides window, Sides output) {
  return {(output.rows - window.rows) / 2, (output.columns - window.columns) / 2};
}

// --- The field ---------------------------------------------------------------------------------

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
  /// The axis of a grid without displacements.
  UNET_FAST_HOST_DEVICE static GridAxis none() { return {1, 0.0}; }
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

/// The index, in a plane of displacements, of the one from which a coefficient is made.
UNET_FAST_HOST_DEVICE inline int64_t knot_of(int32_t grid, int64_t row, int64_t column,
                                             Sides points) {
  return source_point(grid, row, points.rows) * points.columns +
         source_point(grid, column, points.columns);
}

// The pole of the cubic B-spline filter, and how far the filter reaches: |pole|^40 < 1e-22.
constexpr double kPole = -0.26794919243112270647;  // sqrt(3) - 2
constexpr int64_t kHorizon = 40;

/// Turns values, in place, into the coefficients of the cubic B-spline through them, mirrored at
/// the ends (M. Unser, "Splines", IEEE Signal Processing Magazine 16(6), 1999). Takes `lanes` lines
/// side by side, each of n values `stride` apart.
template <int lanes = 1, typename A>
UNET_FAST_HOST_DEVICE inline void prefilter(A* x, int64_t n, int64_t stride) {
  if (n < 2) return;
  A* const last = x + (n - 1) * stride;
  A state[lanes];
  // The first value: the causal filter over the infinitely mirrored line.
  const double to_end = n - 1 < 2 * kHorizon ? std::pow(kPole, static_cast<double>(n - 1)) : 0.0;
  const double norm = 1 / (1 - to_end * to_end);
  for (int l = 0; l < lanes; ++l) {
    state[l] = static_cast<A>(norm) * x[l] + static_cast<A>(norm * to_end) * last[l];
  }
  double near = kPole, far = to_end * to_end / kPole;
  for (int64_t k = 1; k < n - 1 && k < kHorizon; ++k, near *= kPole, far /= kPole) {
    const A weight = static_cast<A>((near + far) * norm);
    for (int l = 0; l < lanes; ++l) state[l] += weight * x[k * stride + l];
  }
  for (int l = 0; l < lanes; ++l) x[l] = state[l];
  const A pole = static_cast<A>(kPole);
  for (int64_t k = 1; k < n; ++k) {
    A* const here = x + k * stride;
    for (int l = 0; l < lanes; ++l) here[l] = state[l] = here[l] + pole * state[l];
  }
  const A end = static_cast<A>(6 * kPole / (kPole * kPole - 1));
  for (int l = 0; l < lanes; ++l) {
    last[l] = state[l] = end * (state[l] + pole * last[l - stride]);
  }
  for (int64_t k = n - 2; k >= 0; --k) {
    A* const here = x + k * stride;
    for (int l = 0; l < lanes; ++l) here[l] = state[l] = pole * (state[l] - 6 * here[l]);
  }
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
struct Motion {
  double linear[2][2];
  double translation[2];
  double shift[2];
  int64_t source = 0;  // the image that is read

  /// The motion of an image. `affine` (N, 2, 3), or null for identity; `offset` (N, 2), or null for
  /// 0. `spans_input`: whether the grid spans the input instead of the output.
  UNET_FAST_HOST_DEVICE static Motion of(const Values& affine, const Values& offset,
                                         bool spans_input, int64_t image) {
    Motion m{{{1, 0}, {0, 1}}, {0, 0}, {0, 0}};
    for (int i = 0; i < 2; ++i) {
      if (affine) {
        const int64_t line = 6 * image + 3 * i;
        m.linear[i][0] = affine[line];
        m.linear[i][1] = affine[line + 1];
        m.translation[i] = affine[line + 2];
      }
      if (offset) m.translation[i] += offset[2 * image + i];
      if (offset && spans_input) m.shift[i] = offset[2 * image + i];
    }
    return m;
  }
  /// One component of a displacement (row, column), which the linear part turns if approximating.
  UNET_FAST_HOST_DEVICE double moved(int32_t grid, int axis, double row, double column) const {
    if (grid == kApproximating) return linear[axis][0] * row + linear[axis][1] * column;
    return axis == 0 ? row : column;
  }
  /// The transpose of `moved`.
  UNET_FAST_HOST_DEVICE double moved_transposed(int32_t grid, int axis, double row,
                                                double column) const {
    if (grid == kApproximating) return linear[0][axis] * row + linear[1][axis] * column;
    return axis == 0 ? row : column;
  }
  /// The affine part of the input position along one axis.
  UNET_FAST_HOST_DEVICE double at(int axis, double row, double column) const {
    return linear[axis][0] * row + linear[axis][1] * column + translation[axis];
  }
};

// --- Positions ---------------------------------------------------------------------------------

/// A position along an axis: pixel + t, with t in [0, 1].
template <typename A>
struct Site {
  int32_t pixel;
  A t;
};

/// The pixel relative to which positions near `position` are stored.
UNET_FAST_HOST_DEVICE inline int32_t anchor_of(double position) {
  const double whole = std::floor(position);
  return whole > -kFarthest ? (whole < kFarthest ? static_cast<int32_t>(whole) : kFarthest)
                            : -kFarthest;  // also for NaN
}

/// The site of the position anchor + local.
template <typename A>
UNET_FAST_HOST_DEVICE inline Site<A> site(A local, int32_t anchor) {
  constexpr A limit = static_cast<A>(kFarthest - 128);  // so that the sum below fits int32_t
  const A whole = std::floor(local);
  const bool found = std::abs(local) < limit;  // false for NaN
  return {found ? static_cast<int32_t>(whole) + anchor : kNowhere, local - whole};
}

/// Mirrors a site once at the ends; valid for positions in [-last, 2 last).
template <typename A>
UNET_FAST_HOST_DEVICE inline Site<A> reflect(Site<A> s, int32_t last) {
  const bool below = s.pixel < 0;
  int32_t pixel = below ? -1 - s.pixel : s.pixel;
  A t = below ? 1 - s.t : s.t;
  const bool above = pixel >= last;
  pixel = above ? 2 * last - 1 - pixel : pixel;
  t = above ? 1 - t : t;
  return {pixel, t};
}

/// Whether a position is finite and near enough to be used.
UNET_FAST_HOST_DEVICE inline bool usable(int32_t pixel) {
  return pixel > -kFarthest && pixel < kFarthest;
}

/// Whether a position lies in [0, last].
template <typename A>
UNET_FAST_HOST_DEVICE inline bool inside(Site<A> s, int32_t last) {
  return s.pixel >= 0 && (s.pixel < last || (s.pixel == last && s.t == 0));
}

/// What is read at a position: pixels, the constant or nothing; the greater of both axes counts.
enum State : uint8_t { kRead, kOutside, kLost };

template <typename A>
UNET_FAST_HOST_DEVICE inline State state_of(Site<A> s, int32_t last, int32_t boundary) {
  if (!usable(s.pixel)) return kLost;
  return boundary == kConstant && !inside(s, last) ? kOutside : kRead;
}

/// The site in the image for a position that is read: pixel in [0, last - 1] (0 if last is 0).
template <typename A>
UNET_FAST_HOST_DEVICE inline Site<A> fold(Site<A> s, int32_t last, int32_t boundary) {
  if (s.pixel >= 0 && s.pixel < last) return s;
  if (last == 0) return {0, 0};
  if (boundary == kMirror) {
    const int32_t period = 2 * last;
    const int32_t rest = s.pixel % period;
    return reflect(Site<A>{rest < 0 ? rest + period : rest, s.t}, last);
  }
  if (boundary == kWrap && !inside(s, last)) {
    const int32_t rest = s.pixel % last;
    return {rest < 0 ? rest + last : rest, s.t};
  }
  return s.pixel < 0 ? Site<A>{0, 0} : Site<A>{last - 1, 1};
}

/// The derivative of the folded position with respect to the position: 1, -1 or 0.
template <typename A>
UNET_FAST_HOST_DEVICE inline A fold_slope(Site<A> s, int32_t last, int32_t boundary) {
  if (s.pixel >= 0 && s.pixel < last) return 1;
  if (last == 0) return 0;
  if (boundary == kMirror) {
    const int32_t rest = s.pixel % (2 * last);
    return (rest < 0 ? rest + 2 * last : rest) < last ? 1 : -1;
  }
  return boundary == kWrap || inside(s, last) ? 1 : 0;
}

// --- Values ------------------------------------------------------------------------------------

/// Pixels that an interpolation reads along an axis, and how many come before the site's pixel.
template <int order>
constexpr int kTaps = order + 1;
template <int order>
constexpr int kBefore = order / 2;

/// The weights of the kTaps pixels at t. For order 0, the one pixel is chosen beforehand.
template <int order, typename A>
UNET_FAST_HOST_DEVICE inline void tap_weights(A t, A (&w)[kTaps<order>]) {
  if constexpr (order == 0) {
    w[0] = 1;
  } else if constexpr (order == 1) {
    w[0] = 1 - t;
    w[1] = t;
  } else {
    const A s = 1 - t, sixth = A(1) / 6;
    w[0] = s * s * s * sixth;
    w[1] = (t * t * (3 * t - 6) + 4) * sixth;
    w[2] = (s * s * (3 * s - 6) + 4) * sixth;
    w[3] = t * t * t * sixth;
  }
}

/// The derivatives of `tap_weights` with respect to t.
template <int order, typename A>
UNET_FAST_HOST_DEVICE inline void tap_slopes(A t, A (&w)[kTaps<order>]) {
  if constexpr (order == 0) {
    w[0] = 0;
  } else if constexpr (order == 1) {
    w[0] = -1;
    w[1] = 1;
  } else {
    const A s = 1 - t;
    w[0] = -s * s / 2;
    w[1] = t * (3 * t - 4) / 2;
    w[2] = -s * (3 * s - 4) / 2;
    w[3] = t * t / 2;
  }
}

/// The pixel nearest to a folded position, halves rounded up; for order 0.
template <typename A>
UNET_FAST_HOST_DEVICE inline int32_t nearest(Site<A> s) {
  return s.pixel + (s.t >= A(0.5) ? 1 : 0);
}

/// The pixel that tap i reads, mirrored at the ends.
template <int order, typename A>
UNET_FAST_HOST_DEVICE inline int32_t tap(Site<A> s, int i, int32_t last) {
  if (last == 0) return 0;
  if constexpr (order == 0) return nearest(s);
  const int32_t pixel = s.pixel + i - kBefore<order>;
  return pixel < 0 ? -pixel : pixel > last ? 2 * last - pixel : pixel;
}

/// The weighted sum of fetch(row, column) over the kTaps x kTaps pixels, both counted from 0.
template <int order, typename A, typename Fetch>
UNET_FAST_HOST_DEVICE inline A interpolate(const A (&y)[kTaps<order>], const A (&x)[kTaps<order>],
                                           Fetch&& fetch) {
  A sum = 0;
  for (int i = 0; i < kTaps<order>; ++i) {
    A line = x[0] * fetch(i, 0);
    for (int k = 1; k < kTaps<order>; ++k) line += x[k] * fetch(i, k);
    sum = i == 0 ? y[0] * line : sum + y[i] * line;
  }
  return sum;
}

/// A piecewise linear grey curve through intervals + 1 values, evenly spaced from 0 to `unit`.
template <typename A>
struct Curve {
  const A* values;
  int32_t intervals;
  A unit;

  UNET_FAST_HOST_DEVICE int32_t interval(A x) const {
    const A most = static_cast<A>(intervals - 1);
    A i = x > 0 ? x : A(0);  // also 0 for NaN
    i = i < most ? i : most;
    return static_cast<int32_t>(i);
  }
  UNET_FAST_HOST_DEVICE A operator()(A value) const {
    const A x = value * (intervals / unit);
    const int32_t i = interval(x);
    const A low = values[i], high = values[i + 1];
    return (low + (x - static_cast<A>(i)) * (high - low)) * unit;
  }
  UNET_FAST_HOST_DEVICE A slope(A value) const {
    const int32_t i = interval(value * (intervals / unit));
    return (values[i + 1] - values[i]) * intervals;
  }
};

/// The grey curves of a batch, (N, C or 1, points); none if `values` is null.
template <typename A>
struct Curves {
  const A* values;
  int64_t channels, points;
  A unit;

  UNET_FAST_HOST_DEVICE explicit operator bool() const { return values != nullptr; }
  UNET_FAST_HOST_DEVICE Curve<A> at(int64_t image, int64_t channel) const {
    const int64_t of = image * channels + (channels > 1 ? channel : 0);
    return {values + of * points, static_cast<int32_t>(points - 1), unit};
  }
};

/// The grey value that 1 stands for in a grey curve: the maximum of integer types.
template <typename T>
constexpr double kUnit =
    std::is_integral_v<T> ? static_cast<double>(std::numeric_limits<T>::max()) : 1.0;

/// A value converted for storage: integers are rounded and clamped, with 0 for NaN.
template <typename T, typename A>
UNET_FAST_HOST_DEVICE inline T stored(A value) {
  if constexpr (std::is_integral_v<T>) {
    constexpr A most = static_cast<A>(kUnit<T>);
    A v = value > 0 ? value : A(0);
    v = v < most ? v : most;
    return static_cast<T>(static_cast<int32_t>(v + A(0.5)));
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace unet_fast::elastic_deform
