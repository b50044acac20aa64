#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/host_device.h"
#include "common/types.h"
#include "elastic_deform/grid.h"

// Arithmetic of the elastic deformation, for one axis where possible; no torch. Where to read is a
// matter of grid.h, too.
namespace unet_fast::elastic_deform {

// What lies outside the input; numbered as in unet_fast/contracts/elastic_deform.py.
enum Boundary : int32_t { kMirror, kConstant, kNearest, kWrap };

// Positions farther than this many pixels, 2^30, are treated like those that are not finite.
constexpr int32_t kFarthest = 1 << 30;
// The pixel of a position that is too far or not finite.
constexpr int32_t kNowhere = INT32_MIN + 1;
constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();

/// Strides of an image or, with one channel, of labels; in elements.
template <int axes>
struct Strides {
  int64_t image, channel, along[axes];

  UNET_FAST_HOST_DEVICE int64_t offset(const Sides<axes>& place) const {
    int64_t result = 0;
    for (int axis = 0; axis < axes; ++axis) result += place[axis] * along[axis];
    return result;
  }
};

/// Strides of the spline coefficients of images, (N, channels, sides + 2); offsets count from the
/// first pixel inside the border.
template <int axes>
Strides<axes> smooth_strides(Sides<axes> sides, int64_t channels) {
  for (int64_t& side : sides.along) side += 2;
  Strides<axes> result{channels * sides.pixels(), sides.pixels(), {}};
  for (int axis = 0; axis < axes; ++axis) result.along[axis] = sides.step(axis);
  return result;
}

/// Elements of such coefficients before the first pixel inside the border.
template <int axes>
int64_t border_of(const Strides<axes>& smooth) {
  int64_t result = 0;
  for (const int64_t step : smooth.along) result += step;
  return result;
}

/// Calls `fn.operator()<axis>()` for each axis.
template <int axes, int axis = 0, typename Fn>
UNET_FAST_HOST_DEVICE inline void for_axes(Fn&& fn) {
  fn.template operator()<axis>();
  if constexpr (axis + 1 < axes) for_axes<axes, axis + 1>(fn);
}

/// Pixels of the output before a window in its centre.
template <int axes>
UNET_FAST_HOST_DEVICE inline Sides<axes> margin_of(const Sides<axes>& window,
                                                   const Sides<axes>& output) {
  Sides<axes> result;
  for (int axis = 0; axis < axes; ++axis) result[axis] = (output[axis] - window[axis]) / 2;
  return result;
}

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

/// Whether the pixel nearest to a folded position is the one behind it; for order 0.
template <typename A>
UNET_FAST_HOST_DEVICE inline bool rounds_up(Site<A> s) {
  return s.t >= A(0.5);
}

/// The pixel that tap i reads, mirrored at the ends.
template <int order, typename A>
UNET_FAST_HOST_DEVICE inline int32_t tap(Site<A> s, int i, int32_t last) {
  if (last == 0) return 0;
  if constexpr (order == 0) return s.pixel + rounds_up(s);
  const int32_t pixel = s.pixel + i - kBefore<order>;
  return pixel < 0 ? -pixel : pixel > last ? 2 * last - pixel : pixel;
}

/// The weights of the pixels that an interpolation reads, along each axis.
template <int order, int axes, typename A>
using Weights = A[axes][kTaps<order>];

/// The weighted sum of fetch(place...) over the pixels that an interpolation reads, their places
/// counted from 0; or, with `along`, its derivative with respect to the position along that axis.
template <int order, int axes, int along = -1, typename A, typename Fetch, typename... Places>
UNET_FAST_HOST_DEVICE inline A interpolate(const Weights<order, axes, A>& weights,
                                           const Weights<order, axes, A>& slopes, Fetch&& fetch,
                                           Places... places) {
  constexpr int axis = sizeof...(Places);
  if constexpr (axis == axes) {
    return fetch(places...);
  } else {
    const auto& w = axis == along ? slopes[axis] : weights[axis];
    A sum = w[0] * interpolate<order, axes, along>(weights, slopes, fetch, places..., 0);
    for (int i = 1; i < kTaps<order>; ++i) {
      sum += w[i] * interpolate<order, axes, along>(weights, slopes, fetch, places..., i);
    }
    return sum;
  }
}

/// A piecewise linear grey curve through intervals + 1 values, evenly spaced from 0 to `unit`.
template <typename A>
struct Curve {
  const A* values;
  int32_t intervals;
  A unit, scale;  // intervals per value

  UNET_FAST_HOST_DEVICE int32_t interval(A x) const {
    const A most = static_cast<A>(intervals - 1);
    A i = x > 0 ? x : A(0);  // also 0 for NaN
    i = i < most ? i : most;
    return static_cast<int32_t>(i);
  }
  UNET_FAST_HOST_DEVICE A operator()(A value) const {
    const A x = value * scale;
    const int32_t i = interval(x);
    const A low = values[i], high = values[i + 1];
    return (low + (x - static_cast<A>(i)) * (high - low)) * unit;
  }
  UNET_FAST_HOST_DEVICE A slope(A value) const {
    const int32_t i = interval(value * scale);
    return (values[i + 1] - values[i]) * intervals;
  }
};

/// The grey curves of a batch, (N, C or 1, points); none if `values` is null.
template <typename A>
struct Curves {
  const A* values;
  int64_t channels, points;
  A unit, scale;

  static Curves of(const A* values, int64_t channels, int64_t points, A unit) {
    return {values, channels, points, unit, static_cast<int32_t>(points - 1) / unit};
  }
  UNET_FAST_HOST_DEVICE explicit operator bool() const { return values != nullptr; }
  UNET_FAST_HOST_DEVICE Curve<A> at(int64_t image, int64_t channel) const {
    const int64_t of = image * channels + (channels > 1 ? channel : 0);
    return {values + of * points, static_cast<int32_t>(points - 1), unit, scale};
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
