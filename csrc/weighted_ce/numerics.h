#pragma once

#include <cmath>
#include <cstdint>

#include "common/elementary.h"
#include "common/host_device.h"

// Weighted softmax cross-entropy of one pixel with logits x_0 ... x_{C-1}, target t and weight w:
//
//   m = max_c x_c,  s = sum_c exp(x_c - m),  ce = log(s) + (m - x_t),  p_c = exp(x_c - m) / s
//   loss = w ce,  d loss / d x_c = w (p_c - [c = t])
//
// Every exponent is <= 0 and 1 <= s <= C, so nothing overflows for finite logits.
namespace unet_fast::weighted_ce {

enum Reduction : int64_t { kNone = 0, kSum = 1, kMean = 2, kWeightedMean = 3 };

/// m of the next logit.
template <typename T>
UNET_FAST_HOST_DEVICE inline T larger(T m, T x) {
  return x > m ? x : m;
}

/// exp(x - m). A pixel whose logits are all -inf has m = -inf: its terms are 0, not NaN.
template <typename T>
UNET_FAST_HOST_DEVICE inline T shifted_exp(T x, T m) {
  return exp_nonpositive(m == T(-INFINITY) ? m : x - m);
}

/// log(s) + (m - x_t); infinite where the target's probability is 0.
template <typename T>
UNET_FAST_HOST_DEVICE inline T cross_entropy(T m, T s, T target_logit) {
  const T gap = m == T(-INFINITY) ? T(INFINITY) : m - target_logit;
  return s == T(0) ? gap : log_above_one(s) + gap;
}

/// w ce. A pixel of weight 0 counts nothing whatever its logits are.
template <typename T>
UNET_FAST_HOST_DEVICE inline T weighted(T weight, T ce) {
  return weight == T(0) ? T(0) : weight * ce;
}

/// 1 / s, for the probabilities.
template <typename T>
UNET_FAST_HOST_DEVICE inline T inverse_sum(T s) {
  return s == T(0) ? T(0) : T(1) / s;
}

/// d loss / d x_c from exp(x_c - m), 1 / s and the pixel's coefficient (upstream gradient x w).
template <typename T>
UNET_FAST_HOST_DEVICE inline T gradient(T shifted, T inverse_sum, bool is_target, T coefficient) {
  const T p = shifted * inverse_sum;
  return coefficient == T(0) ? T(0) : coefficient * (is_target ? p - T(1) : p);
}

/// Running sums of a reduction, in double: a sum over 10^9 pixels still keeps float32's digits.
struct Sums {
  double loss = 0;    // sum of w ce
  double weight = 0;  // sum of w
  double pixels = 0;  // pixels not ignored

  UNET_FAST_HOST_DEVICE void add(const Sums& other) {
    loss += other.loss;
    weight += other.weight;
    pixels += other.pixels;
  }
};

/// What the sum of w ce is divided by.
UNET_FAST_HOST_DEVICE inline double normaliser(const Sums& sums, int64_t reduction) {
  return reduction == kWeightedMean ? sums.weight : reduction == kMean ? sums.pixels : 1.0;
}

/// a / normaliser, and 0 where there is nothing to divide by: no pixel counts, so neither does the
/// loss nor its gradient.
UNET_FAST_HOST_DEVICE inline double normalised(double a, double normaliser) {
  return normaliser == 0 ? 0.0 : a / normaliser;
}

}  // namespace unet_fast::weighted_ce
