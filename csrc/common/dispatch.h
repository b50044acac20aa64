#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <utility>

namespace unet_fast {

/// Calls `fn.operator()<T>()` with the C++ type of a floating-point tensor.
template <typename Fn>
void dispatch_floating(torch::headeronly::ScalarType dtype, const char* op, Fn&& fn) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Half:
      return std::forward<Fn>(fn).template operator()<torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return std::forward<Fn>(fn).template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Float:
      return std::forward<Fn>(fn).template operator()<float>();
    case ScalarType::Double:
      return std::forward<Fn>(fn).template operator()<double>();
    default:
      STD_TORCH_CHECK(false, op, ": expected a floating-point tensor, got ",
                      torch::headeronly::toString(dtype));
  }
}

/// Calls `fn.operator()<T>()` with the C++ type of a tensor of class indices.
template <typename Fn>
void dispatch_ids(torch::headeronly::ScalarType dtype, const char* op, Fn&& fn) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Byte:
      return std::forward<Fn>(fn).template operator()<uint8_t>();
    case ScalarType::Short:
      return std::forward<Fn>(fn).template operator()<int16_t>();
    case ScalarType::Int:
      return std::forward<Fn>(fn).template operator()<int32_t>();
    case ScalarType::Long:
      return std::forward<Fn>(fn).template operator()<int64_t>();
    default:
      STD_TORCH_CHECK(false, op, ": expected uint8, int16, int32 or int64, got ",
                      torch::headeronly::toString(dtype));
  }
}

/// Calls `fn.operator()<T>()` with the C++ type of a label map.
template <typename Fn>
void dispatch_labels(torch::headeronly::ScalarType dtype, const char* op, Fn&& fn) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Char:
      return std::forward<Fn>(fn).template operator()<int8_t>();
    case ScalarType::UInt16:
      return std::forward<Fn>(fn).template operator()<uint16_t>();
    default:
      return dispatch_ids(dtype, op, std::forward<Fn>(fn));
  }
}

}  // namespace unet_fast
