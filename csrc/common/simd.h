#pragma once

/// Marks a function whose loop over pixels the compiler vectorises. Not inlined, so that callers do
/// not change its code. CMakeLists.txt compiles all CPU kernels once for each SIMD level.
#define UNET_FAST_SIMD __attribute__((noinline))

/// Placed before a loop: promises that its iterations do not alias each other's memory.
#if defined(__clang__)
#define UNET_FAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define UNET_FAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define UNET_FAST_INDEPENDENT
#endif
