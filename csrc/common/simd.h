#pragma once

// The package ships for plain x86-64. A function marked UNET_FAST_SIMD is compiled for the
// baseline, for AVX2 with FMA (x86-64-v3) and for AVX-512 (x86-64-v4), and the loader picks one by
// the CPU. Other architectures and compilers without these names take their own vectorisation.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define UNET_FAST_SIMD \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define UNET_FAST_SIMD __attribute__((noinline))
#endif

/// Before a loop: its iterations do not touch each other's memory, whatever the compiler fears.
#if defined(__clang__)
#define UNET_FAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define UNET_FAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define UNET_FAST_INDEPENDENT
#endif

namespace unet_fast {

/// The instruction set that UNET_FAST_SIMD functions use on this machine.
inline const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "baseline";
}

}  // namespace unet_fast
