#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/elementary.h"
#include "common/host_device.h"

// Squared distances to the two nearest objects, the weights made of them, and the ridge between
// touching objects.
//
// The transform is separable: one axis after the other, every pixel keeps the two nearest distinct
// objects among the lines seen so far. Two suffice, because a step along the next axis adds the
// same to all distances of a pixel (proof: docs/border_weight_map.md).
namespace unet_fast::border_weight_map {

constexpr uint8_t kIgnored = 255;  // target of ignored pixels
constexpr int kMaxClasses = 254;   // background included; class 254 is always out of range

/// The ridge of background between touching objects: none, one pixel or two pixels wide.
enum Ridge : int64_t { kNone, kOneSided, kTwoSided };

/// Farther than any object. Half the range of integers, so that adding two does not overflow.
template <typename D>
constexpr D kFar =
    std::is_integral_v<D> ? std::numeric_limits<D>::max() / 2 : std::numeric_limits<D>::infinity();

/// Greater than kFar for integer types, else infinity as well.
template <typename D>
constexpr D kBeyond =
    std::is_integral_v<D> ? std::numeric_limits<D>::max() : std::numeric_limits<D>::infinity();

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxLabel = std::numeric_limits<int32_t>::max();

/// Steps to an object that a sweep has not met; more than the length of any axis.
constexpr int32_t kNever = 1 << 30;

/// Steps along an axis beyond which an object counts as infinitely far.
template <typename D>
constexpr int32_t kMostSteps = sizeof(D) == 2 ? 127 : kNever - 1;

/// The squared distance of `step` pixels along an axis; `scale` is the squared size of a pixel.
template <typename D>
UNET_FAST_HOST_DEVICE inline D squared(int32_t step, D scale) {
  const D steps = static_cast<D>(step <= kMostSteps<D> ? step : 0);
  return step <= kMostSteps<D> ? static_cast<D>(steps * steps * scale) : kFar<D>;
}

/// Type of labels kept beside distances of type D: 16 bits with 16-bit distances, so that a vector
/// holds twice as many.
template <typename D>
using LabelOf = std::conditional_t<sizeof(D) == 2, int16_t, int32_t>;

// Each selection below depends on a single comparison, without boolean logic, so that compilers can
// vectorise loops over it.

/// The last two distinct objects that a sweep along a line has met, and where.
struct Met {
  int32_t label = 0, other = 0;  // 0: none
  int32_t at = -kNever, other_at = -kNever;

  UNET_FAST_HOST_DEVICE void meet(int32_t object, int32_t position) {
    const int32_t now = object == 0 ? label : object;
    other = now == label ? other : label;
    other_at = now == label ? other_at : at;
    label = now;
    at = object == 0 ? at : position;
  }
};

/// The two nearest distinct objects so far. D is int32_t if all squared distances are integers
/// below kFar / 2; int16_t if they are integers, those that matter are below kFar, and labels fit;
/// else a floating-point type.
template <typename D>
struct alignas(sizeof(D) == 4 ? 16 : 8) Nearest {  // aligned for 16-byte loads on CUDA
  using Label = LabelOf<D>;

  D first, second;            // squared distances
  Label label, second_label;  // of the objects; arbitrary if the distance is kFar

  /// Adds an object at squared distance d.
  UNET_FAST_HOST_DEVICE void add(D d, Label object) {
    const Label farther_label = d < first ? label : object;
    const D farther = d < first ? first : d;
    const D other = object == label ? kBeyond<D> : farther;
    // `<=`, so also on ties: if `second_label` stayed when its object becomes the first, one object
    // would be stored twice, which a later axis could take for two.
    second_label = other <= second ? farther_label : second_label;
    second = other < second ? other : second;
    label = d < first ? object : label;
    first = d < first ? d : first;
  }

  /// Adds the two objects of a pixel that is a squared distance `far` away along an axis.
  UNET_FAST_HOST_DEVICE void add(const Nearest& other, D far) {
    add(static_cast<D>(other.first + far), other.label);
    add(static_cast<D>(other.second + far), other.second_label);
  }
};

/// Squared distances up to which objects matter to a search.
template <typename D>
struct Reach {
  D first;   // reach of the nearest object by itself
  D second;  // reach of the second nearest object
  D half;    // the second object counts only if the nearest is no farther

  /// The squared distance below which further objects can still change the result, if all objects
  /// nearer than `near` are known.
  UNET_FAST_HOST_DEVICE D bound(D near, D nearest, D other) const {
    const D enough = near < half ? kFar<D> : half;
    const D of_first = nearest < first ? nearest : first;
    const D of_second = other < second ? other : second;
    const D counted = nearest <= enough ? of_second : 0;
    return of_first < counted ? counted : of_first;
  }
};

/// Reaches along the last axis and, in volumes, along the axis before it.
template <typename D>
struct Reaches {
  Reach<D> last, other;
  double most;  // the distance beyond which nothing matters

  static Reaches unlimited() {
    const Reach<D> all{kFar<D>, kFar<D>, kFar<D>};
    return {all, all, std::numeric_limits<double>::infinity()};
  }
  /// Reaches of the terms of a weight map, which vanish beyond `border` and `halo`: two objects
  /// whose distances add up to more than `border` have no effect.
  static Reaches of_terms(double border, double halo) {
    // Rounded up, so that objects just within the reach count.
    const auto square = [](double distance) {
      const double up =
          std::is_integral_v<D> ? std::floor(distance * distance) + 1 : distance * distance;
      return static_cast<D>(std::min(up, static_cast<double>(kFar<D>)));
    };
    const double most = std::max(border, halo);
    return {{square(halo), square(border), square(border / 2)},
            {square(most), square(most), kFar<D>},
            most};
  }
};

/// The square root of a squared distance; infinite for kFar.
template <typename D>
UNET_FAST_HOST_DEVICE inline float root(D square) {
  // For float, sqrt in float gives the same digits as sqrt in double, rounded.
  using Wide = std::conditional_t<std::is_same_v<D, float>, float, double>;
  const float distance = static_cast<float>(std::sqrt(static_cast<Wide>(square)));
  return square < kFar<D> ? distance : kInfinity;
}

/// The term height exp(-d^2 / (2 sigma^2)) of a distance d.
struct Term {
  float height, scale;  // scale: 1 / (sqrt(2) sigma)
  double extent;        // where the term falls below 2^-28, negligible beside weights near 1

  static Term of(double height, double sigma) {
    const double ratio = std::ldexp(height, 28);
    return {static_cast<float>(height), static_cast<float>(1 / (std::sqrt(2.0) * sigma)),
            ratio > 1 ? sigma * std::sqrt(2 * std::log(ratio)) : 0};
  }
  /// 0 for an infinite distance, however wide the term.
  UNET_FAST_HOST_DEVICE float operator()(float d) const {
    const float z = d * scale;
    const float value = height * exp_nonpositive(-(z * z));
    return d < kInfinity ? value : 0.0f;
  }
};

/// The terms that distances add to the weight of a pixel: the border term (equation 2 of the paper)
/// of d1 + d2, and the halo (Falk et al. 2019) of d1.
struct Terms {
  Term border, halo;

  template <typename D>
  Reaches<D> reaches() const {
    return Reaches<D>::of_terms(border.extent, halo.extent);
  }
};

/// Whether a pixel of class `target` gets the border term.
UNET_FAST_HOST_DEVICE inline bool gets_border(uint8_t target, bool everywhere) {
  return (target == 0) | (everywhere & (target != kIgnored));
}

/// The balanced weight of a class with n of an image's `total` pixels, if `present` classes have at
/// least one pixel.
UNET_FAST_HOST_DEVICE inline float balanced_weight(int64_t n, int64_t total, int64_t present) {
  return n == 0 ? 0.0f
                : static_cast<float>(static_cast<double>(total) /
                                     (static_cast<double>(present) * static_cast<double>(n)));
}

/// Whether a pixel of object `here` is next to another object.
UNET_FAST_HOST_DEVICE inline bool touches(int32_t here, int32_t neighbour) {
  return (here != 0) & (neighbour != 0) & (here != neighbour);
}

/// Whether the neighbour at (z, y, x), each -1, 0 or 1, makes a pixel part of the ridge.
UNET_FAST_HOST_DEVICE inline bool in_ridge(int64_t ridge, int z, int y, int x) {
  if (ridge == kTwoSided) return z * z + y * y + x * x == 1;
  return ridge == kOneSided && (z < 0 || (z == 0 && (y < 0 || (y == 0 && x < 0))));
}

}  // namespace unet_fast::border_weight_map
