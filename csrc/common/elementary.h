#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"

// exp and log for the inner loops. On the host the float versions are branch-free, so that
// compilers vectorise the loops that call them; on the device and in double they are the library's.
namespace unet_fast {

/// exp(x) for x <= 0. float on the host: relative error under 1.5e-7; results below 2^-126 are 0.
inline float exp_nonpositive_host(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693145751953125f;  // 16 bits: products with small integers are exact
  constexpr float kLn2Low = 1.42860682030941723e-6f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // Taylor series; the first term left out is r^8 / 8! < 6e-9.
  float y = 1.0f / 5040.0f;
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) + 127u;  // low bits hold n
  const float scale = std::bit_cast<float>(exponent << 23);
  return x < -87.3f ? 0.0f : y * scale;
}

/// log(x) for finite x >= 1 (NaN stays NaN). float on the host: relative error under 2.5e-7.
inline float log_above_one_host(float x) {
  constexpr float kLn2 = 0.693147180559945309f;
  constexpr uint32_t kHalfRoot = 0x3f3504f3u;  // sqrt(1/2): the mantissa is taken around 1
  const uint32_t bits = std::bit_cast<uint32_t>(x) - kHalfRoot;
  const int32_t exponent = static_cast<int32_t>(bits) >> 23;
  const float m = std::bit_cast<float>((bits & 0x007fffffu) + kHalfRoot);  // [sqrt(1/2), sqrt(2))
  // log(m) = 2 atanh(f), f = (m - 1) / (m + 1), |f| < 0.172; the series is cut at f^11 / 11.
  const float f = (m - 1.0f) / (m + 1.0f);
  const float g = f * f;
  float y = 1.0f / 9.0f;
  y = y * g + 1.0f / 7.0f;
  y = y * g + 1.0f / 5.0f;
  y = y * g + 1.0f / 3.0f;
  y = y * g + 1.0f;
  return static_cast<float>(exponent) * kLn2 + 2.0f * f * y + (x - x);  // x - x: NaN stays NaN
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

/// log(x) for finite x >= 1.
UNET_FAST_HOST_DEVICE inline float log_above_one(float x) {
#if defined(__CUDA_ARCH__)
  return ::logf(x);
#else
  return log_above_one_host(x);
#endif
}
UNET_FAST_HOST_DEVICE inline double log_above_one(double x) { return ::log(x); }

}  // namespace unet_fast
