#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"

// exp and log for the inner loops. The float versions are branch-free, so that compilers vectorise
// loops that call them, and shorter than CUDA's log1pf; for exp on the device, and in double, the
// standard library's are used.
namespace unet_fast {

/// exp(x) for x <= 0. float on the host: relative error under 1.5e-7; results below 2^-126.5 are 0.
inline float exp_nonpositive_host(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693145751953125f;  // 16 bits: products with small integers are exact
  constexpr float kLn2Low = 1.42860682030941723e-6f;
  // 1.5 * 2^23, plus the bias of exponents: adding it rounds to the nearest integer.
  constexpr float kMagic = 12583039.0f;
  constexpr float kLowest = -88.1f;  // at or below it n is -127, for which `scale` is 0
  x = x < kLowest ? kLowest : x;
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // exp(r) = 1 + r + r^2 P(r); P is fitted for the least relative error, 3.1e-9.
  float p = 0.00138145406f;
  p = p * r + 0.00836874545f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  const float y = p * r + 1.0f;
  const float scale = std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);  // 2^n
  return y * scale;
}

/// log(1 + x) for finite x >= 0 (NaN stays NaN). float: relative error under 2e-7.
UNET_FAST_HOST_DEVICE inline float log1p_nonnegative(float x) {
  constexpr float kLn2 = 0.693147180559945309f;
  constexpr uint32_t kHalfRoot = 0x3f3504f3u;  // bits of sqrt(1/2), the lower end of m
  const float u = 1.0f + x;                    // nvcc takes no std::bit_cast here
  const uint32_t bits = __builtin_bit_cast(uint32_t, u) - kHalfRoot;
  const int32_t exponent = static_cast<int32_t>(bits) >> 23;
  const float m =
      __builtin_bit_cast(float, (bits & 0x007fffffu) + kHalfRoot);  // [sqrt(1/2), sqrt(2))
  // Small x are used as they are: they keep the digits that 1 + x rounds away. NaN passes here,
  // too.
  const float f = u >= 1.41421354f ? m - 1.0f : x;
  // log(1 + f) = f - f^2 / 2 + f^3 Q(f); Q is fitted for the least relative error, 5.8e-9.
  float q = -0.0763449892f;
  q = q * f + 0.127615809f;
  q = q * f - 0.131601825f;
  q = q * f + 0.142017573f;
  q = q * f - 0.166233569f;
  q = q * f + 0.200012267f;
  q = q * f - 0.250008196f;
  q = q * f + 0.333333313f;
  q = q * f - 0.5f;
  return static_cast<float>(exponent) * kLn2 + (q * (f * f) + f);
}

/// exp(x) for x <= 0 (also -inf; NaN stays NaN).
UNET_FAST_HOST_DEVICE inline float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return ::expf(x);
#else
  return exp_nonpositive_host(x);
#endif
}
UNET_FAST_HOST_DEVICE inline double exp_nonpositive(double x) { return ::exp(x); }

UNET_FAST_HOST_DEVICE inline double log1p_nonnegative(double x) { return ::log1p(x); }

}  // namespace unet_fast
