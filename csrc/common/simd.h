#pragma once

/// A loop over pixels that the compiler turns into vectors, by itself: what calls it does not
/// change its code. CMakeLists.txt compiles all CPU kernels once for each level of instructions.
#define UNET_FAST_SIMD __attribute__((noinline))

/// Before a loop: its iterations do not touch each other's memory, whatever the compiler fears.
#if defined(__clang__)
#define UNET_FAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define UNET_FAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define UNET_FAST_INDEPENDENT
#endif
