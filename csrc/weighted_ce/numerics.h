#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/elementary.h"
#include "common/host_device.h"

// Weighted softmax cross-entropy of one pixel with logits x_0 ... x_{C-1}, target t and weight w:
//
//   m = max_c x_c,  s = sum_c exp(x_c - m),  ce = log(s) + (m - x_t),  p_c = exp(x_c - m) / s
//   loss = w ce,  d loss / d x_c = w (p_c - [c = t])
//
// Every exponent is <= 0 and 1 <= s <= C, so nothing overflows for finite logits. s - 1, the sum
// without the 1 of the largest logit, is stored instead of s, so that a confident pixel, s = 1 +
// 1e-9, keeps the digits of its loss and gradient.
namespace unet_fast::weighted_ce {

enum Reduction : int64_t { kNone = 0, kSum = 1, kMean = 2, kWeightedMean = 3 };

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::max();

/// The least number with all digits.
template <typename T>
constexpr T kLeast = std::numeric_limits<T>::min();

/// m and s of the logits so far, each read once: a new largest logit rescales the sum. m is never
/// below the lowest finite number, so that -inf minus -inf does not occur.
template <typename T>
struct Softmax {
  T largest;      // m
  T rest = T(0);  // s - 1

  UNET_FAST_HOST_DEVICE static Softmax of(T x) { return {x < kLowest<T> ? kLowest<T> : x}; }
  UNET_FAST_HOST_DEVICE void add(T x) {
    const T e = exp_nonpositive(-std::abs(x - largest));
    rest = rest * (x > largest ? e : T(1)) + e;
    largest = x > largest ? x : largest;
  }

  /// s - 1, or NaN if the largest logit is NaN or +inf: the softmax would divide infinities, so
  /// neither the loss nor any gradient of the pixel is defined.
  UNET_FAST_HOST_DEVICE T defined_rest() const { return rest + (largest - largest); }
};

/// Softmax over many logits, with Kahan summation to make up for rounding.
template <typename T>
struct LongSoftmax : Softmax<T> {
  T excess = T(0);  // by which rounding made `rest` too large

  UNET_FAST_HOST_DEVICE static LongSoftmax of(T x) { return {Softmax<T>::of(x)}; }
  UNET_FAST_HOST_DEVICE void add(T x) {
    const T e = exp_nonpositive(-std::abs(x - this->largest));
    const T scale = x > this->largest ? e : T(1);
    const T before = this->rest * scale, term = e - excess * scale;
    this->rest = before + term;
    excess = (this->rest - before) - term;
    this->largest = x > this->largest ? x : this->largest;
  }
};

/// Sums of the terms exp(x - m) of logits whose largest, m, is known.
template <typename T>
struct Terms {
  T rest = T(0);     // sum over logits below the largest
  T largest = T(0);  // number of logits equal to the largest

  UNET_FAST_HOST_DEVICE T add(T x, T m) {
    const T e = exp_nonpositive(x - m);
    rest = x == m ? rest : rest + e;
    largest = x == m ? largest + T(1) : largest;
    return e;
  }
  UNET_FAST_HOST_DEVICE Softmax<T> softmax(T m) const {
    return {m, largest > T(1) ? rest + (largest - T(1)) : rest};
  }
};

/// exp(x - m) of one of at most two logits; of two, the smaller one has the term `rest`.
template <typename T>
UNET_FAST_HOST_DEVICE inline T term_of_two(const Softmax<T>& softmax, T x) {
  return x == softmax.largest ? T(1) : softmax.rest;
}

/// Softmax of logits of which all are at hand, with the terms exp(x_c - m) that the gradient needs.
/// A pair takes one exponential.
template <typename T, int classes>
struct FewTerms {
  T x[classes];
  T term[classes];
  Softmax<T> softmax;

  UNET_FAST_HOST_DEVICE void exponentiate() {
    if constexpr (classes == 2) {
      softmax = Softmax<T>::of(x[0]);
      const T e = exp_nonpositive(-std::abs(x[1] - softmax.largest));
      softmax = {x[1] > softmax.largest ? x[1] : softmax.largest, e};
      for (int c = 0; c < 2; ++c) term[c] = term_of_two(softmax, x[c]);
    } else {
      T m = kLowest<T>;
      for (int c = 0; c < classes; ++c) m = x[c] > m ? x[c] : m;
      Terms<T> terms;
      for (int c = 0; c < classes; ++c) term[c] = terms.add(x[c], m);
      softmax = terms.softmax(m);
    }
  }
};

/// Softmax of many logits, given a few at a time, with one exponential each and one more for all of
/// them. Kahan summation makes up for rounding. A NaN makes `rest` NaN, though not `m`.
template <typename T>
struct RunningTerms {
  T m = kLowest<T>;
  T rest = T(0);    // as in Terms
  int largest = 0;  // as in Terms
  T excess = T(0);  // by which rounding made `rest` too large

  template <int n>
  UNET_FAST_HOST_DEVICE void add(const T (&x)[n]) {
    T greatest = m;
    for (int i = 0; i < n; ++i) greatest = std::fmax(x[i], greatest);
    raise(greatest);
    T sum(0);
    for (int i = 0; i < n; ++i) {
      const T e = exp_nonpositive(x[i] - m);
      sum += x[i] == m ? T(0) : e;
      largest += x[i] == m;
    }
    const T before = rest, term = sum - excess;
    rest = before + term;
    excess = (rest - before) - term;
  }

  /// Takes `greatest`, at least m, for m.
  UNET_FAST_HOST_DEVICE void raise(T greatest) {
    const T scale = exp_nonpositive(m - greatest);
    rest = (greatest > m ? rest + static_cast<T>(largest) : rest) * scale;
    largest = greatest > m ? 0 : largest;
    excess *= scale;
    m = greatest;
  }

  UNET_FAST_HOST_DEVICE Softmax<T> softmax() const {
    return Terms<T>{rest, static_cast<T>(largest)}.softmax(m);
  }
};

/// log(s) + (m - x_t); infinite if the probability of the target is 0. With S = double, the
/// difference of two floats cannot overflow.
template <typename S, typename T>
UNET_FAST_HOST_DEVICE inline S cross_entropy(const Softmax<T>& softmax, T target_logit) {
  return static_cast<S>(log1p_nonnegative(softmax.defined_rest())) +
         (static_cast<S>(softmax.largest) - static_cast<S>(target_logit));
}

/// w ce, or 0 for weight 0, whatever the logits are.
template <typename S>
UNET_FAST_HOST_DEVICE inline S weighted(S weight, S ce) {
  return weight == S(0) ? S(0) : weight * ce;
}

/// w ce of one pixel, computed in double, so that it overflows only if T cannot hold the result.
template <typename T>
UNET_FAST_HOST_DEVICE inline T pixel_loss(T weight, const Softmax<T>& softmax, T target_logit) {
  const double ce = cross_entropy<double>(softmax, target_logit);
  return static_cast<T>(weighted(static_cast<double>(weight), ce));
}

/// u w / s, the factor of all gradients of a pixel, given u w and whether neither u nor w is 0.
template <typename T>
UNET_FAST_HOST_DEVICE inline T gradient_scale(const Softmax<T>& softmax, T factor, bool counts) {
  return counts ? factor / (softmax.defined_rest() + T(1)) : T(0);
}

/// u w / s; u: upstream gradient. If the product is 0 only
/// by rounding, NaN still gets through.
template <typename T>
UNET_FAST_HOST_DEVICE inline T gradient_scale(const Softmax<T>& softmax, T weight,
                                              double upstream) {
  const T factor = static_cast<T>(static_cast<double>(weight) * upstream);
  const bool counts = weight != T(0) && upstream != 0;
  return gradient_scale(softmax, factor, counts);
}

/// d loss / d x_c = u w / s (e_c - [c = t] s) with e_c = exp(x_c - m).
template <typename T>
UNET_FAST_HOST_DEVICE inline T gradient(const Softmax<T>& softmax, T e, bool is_target, T scale) {
  const T slope = is_target ? (e - T(1)) - softmax.rest : e;
  return scale == T(0) ? T(0) : scale * slope;
}

/// An upstream gradient that many pixels share. In T as well, so that the product with a weight
/// needs no double; but only where T holds it, since a weighted mean of tiny weights divides by
/// their sum.
template <typename T>
struct Upstream {
  double exact;
  T rounded;
  bool fits;

  UNET_FAST_HOST_DEVICE static Upstream of(double u) {
    const double size = std::abs(u);
    return {u, static_cast<T>(u), size >= kLeast<T> && size <= -kLowest<T>};
  }
  UNET_FAST_HOST_DEVICE T scale(const Softmax<T>& softmax, T weight) const {
    return fits ? gradient_scale(softmax, weight * rounded, weight != T(0))
                : gradient_scale(softmax, weight, exact);
  }
};

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

/// Whether sums kept in float are as good as those in double. Huge weights or logits overflow a
/// product or a difference. Products below 2^-126 lose digits, but too few to show in a loss of at
/// least 2^-100 or, with a total weight of at least 2^-16, in a mean above 2^-126.
UNET_FAST_HOST_DEVICE inline bool accurate(const Sums& sums) {
  const bool vanishing = sums.loss < 0x1p-100 && sums.weight < 0x1p-16 && sums.weight != 0;
  return std::isfinite(sums.loss + sums.weight) && !vanishing;
}

/// The sums that `sums.operator()<A>()` keeps in A or, if those are not accurate, in double.
template <typename A, typename Fn>
UNET_FAST_HOST_DEVICE inline Sums accurate_sums(Fn&& sums) {
  const Sums fast = sums.template operator()<A>();
  return accurate(fast) ? fast : sums.template operator()<double>();
}

/// The divisor of the sum of w ce.
UNET_FAST_HOST_DEVICE inline double normaliser(const Sums& sums, int64_t reduction) {
  return reduction == kWeightedMean ? sums.weight : reduction == kMean ? sums.pixels : 1.0;
}

/// a / normaliser, or 0 if the normaliser is 0: then no pixel counts, and both the loss and its
/// gradient are 0.
UNET_FAST_HOST_DEVICE inline double normalised(double a, double normaliser) {
  return normaliser == 0 ? 0.0 : a / normaliser;
}

}  // namespace unet_fast::weighted_ce
