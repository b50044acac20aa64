#pragma once

#include <cstdint>
#include <type_traits>

namespace unet_fast {

/// The type of arithmetic on values of type T: double for double, else float.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// The type of labels and classes at run time. Kernels switch on it instead of being templates,
/// which would multiply the number of kernels to compile.
enum class IntegerType { kInt8, kUint8, kInt16, kUint16, kInt32, kInt64 };

template <typename T>
constexpr IntegerType kIntegerType =
    sizeof(T) == 8   ? IntegerType::kInt64
    : sizeof(T) == 4 ? IntegerType::kInt32
    : sizeof(T) == 2 ? (T(-1) < 0 ? IntegerType::kInt16 : IntegerType::kUint16)
                     : (T(-1) < 0 ? IntegerType::kInt8 : IntegerType::kUint8);

/// Calls `fn.operator()<T>()` with the C++ type of integers of type `type`.
template <typename Fn>
void with_integer_type(IntegerType type, Fn&& fn) {
  switch (type) {
    case IntegerType::kInt8:
      return fn.template operator()<int8_t>();
    case IntegerType::kUint8:
      return fn.template operator()<uint8_t>();
    case IntegerType::kInt16:
      return fn.template operator()<int16_t>();
    case IntegerType::kUint16:
      return fn.template operator()<uint16_t>();
    case IntegerType::kInt32:
      return fn.template operator()<int32_t>();
    default:
      return fn.template operator()<int64_t>();
  }
}

constexpr int64_t bytes_of(IntegerType type) {
  return type == IntegerType::kInt64 ? 8 : int64_t{1} << static_cast<int>(type) / 2;
}

}  // namespace unet_fast
