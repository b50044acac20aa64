#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/elementary.h"

namespace py = pybind11;

// Python bindings for everything that is not a tensor operator. This file includes no torch header,
// so the module depends on the Python version only.
PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native libraries were built, and the scalar numerics they share.";

  m.def("build_info", [] {
    py::dict info;
    info["version"] = UNET_FAST_VERSION;
    info["compiler"] = UNET_FAST_COMPILER;
    info["built_with_torch"] = UNET_FAST_BUILD_TORCH;
    info["min_torch"] = UNET_FAST_MIN_TORCH;
    info["cuda_architectures"] = UNET_FAST_CUDA_ARCHITECTURES;  // empty: built without CUDA
    return info;
  });
  m.def("simd_levels", [] {  // levels built and supported by this processor, best last
    std::vector<std::string> levels{"baseline"};
#if defined(UNET_FAST_X86_LEVELS)
    if (__builtin_cpu_supports("x86-64-v3")) levels.push_back("AVX2");
    if (__builtin_cpu_supports("x86-64-v4")) levels.push_back("AVX-512");
#endif
    return levels;
  });

  auto numerics =
      m.def_submodule("numerics", "The scalar functions of the CPU kernels' inner loops.");
  numerics.def("exp_nonpositive", py::vectorize(&unet_fast::exp_nonpositive_host));
  numerics.def("log1p_nonnegative",
               py::vectorize([](float x) { return unet_fast::log1p_nonnegative(x); }));
}
