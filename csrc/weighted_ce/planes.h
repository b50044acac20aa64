#pragma once

#include <algorithm>
#include <cstdint>

#include "common/layout.h"
#include "common/simd.h"

// Part of cpu.cpp: classes as planes of pixels, and copies between planes and other layouts.
namespace unet_fast::weighted_ce {

constexpr int64_t kGroup = 4;   // classes per pass over a block
constexpr int64_t kPiece = 64;  // pixels of channels-last tensors that are copied together

// Rows of pixels, one per class, `stride` elements apart.
template <typename A>
struct Planes {
  A* data;
  int64_t stride;

  A* operator[](int64_t c) const { return data + c * stride; }
  operator Planes<const A>() const { return {data, stride}; }
};

// Calls `fn.operator()<n>(c)` for groups of n classes from class c on; n <= kGroup is a constant,
// so that loops over a group are unrolled.
template <typename Fn>
void for_groups(int64_t classes, Fn&& fn) {
  int64_t c = 0;
  for (; c + kGroup <= classes; c += kGroup) fn.template operator()<kGroup>(c);
  if (classes - c == 1) fn.template operator()<1>(c);
  if (classes - c == 2) fn.template operator()<2>(c);
  if (classes - c == 3) fn.template operator()<3>(c);
}

// Reads n classes of a piece into planes. Classes side by side are first packed without those
// between pixels, because compilers vectorise loops that part n interleaved rows.
template <int64_t n, typename T, typename A>
UNET_FAST_SIMD void load(const T* source, int64_t class_stride, int64_t pixel_stride, int64_t size,
                         Planes<A> planes) {
  if (n > 1 && class_stride == 1) {
    T packed[n * kPiece];
    if (pixel_stride != n) {
      for (int64_t i = 0; i < size; ++i) std::copy_n(source + i * pixel_stride, n, packed + i * n);
      source = packed;
    }
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t k = 0; k < n; ++k) planes[k][i] = static_cast<A>(source[i * n + k]);
    }
    return;
  }
  for (int64_t k = 0; k < n; ++k, source += class_stride) {
    A* const plane = planes[k];
    if (pixel_stride == 1) {
      for (int64_t i = 0; i < size; ++i) plane[i] = static_cast<A>(source[i]);
    } else {
      for (int64_t i = 0; i < size; ++i) plane[i] = static_cast<A>(source[i * pixel_stride]);
    }
  }
}

// Writes planes of n classes of a piece; the reverse of `load`.
template <int64_t n, typename T, typename A>
UNET_FAST_SIMD void store(Planes<A> planes, int64_t size, T* destination, int64_t class_stride,
                          int64_t pixel_stride) {
  if (n > 1 && class_stride == 1) {
    T packed[n * kPiece];
    T* const pixels = pixel_stride == n ? destination : packed;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t k = 0; k < n; ++k) pixels[i * n + k] = static_cast<T>(planes[k][i]);
    }
    for (int64_t i = 0; i < (pixels == packed ? size : 0); ++i) {
      std::copy_n(packed + i * n, n, destination + i * pixel_stride);
    }
    return;
  }
  for (int64_t k = 0; k < n; ++k, destination += class_stride) {
    const A* const plane = planes[k];
    if (pixel_stride == 1) {
      for (int64_t i = 0; i < size; ++i) destination[i] = static_cast<T>(plane[i]);
    } else {
      for (int64_t i = 0; i < size; ++i) destination[i * pixel_stride] = static_cast<T>(plane[i]);
    }
  }
}

// Calls `move.operator()<n>(first, c, i, size)` for pieces of a block, pixels i ... i + size - 1,
// and groups of classes, whose first element is `first`; the block starts at pixel p. All classes
// of a piece come before the next piece, so that channels-last tensors are taken in the order of
// their memory. It is asked for one piece ahead: a processor does not foresee it from a few classes
// of each pixel.
template <typename T, typename Move>
void for_pieces(T* data, const Layout& x, int64_t image, int64_t p, int64_t pixels, Move&& move) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t piece = x.class_stride == 1 ? kPiece : pixels;
  for (int64_t i = 0; i < pixels; i += piece) {
    const int64_t size = std::min(piece, pixels - i), next = p + i + size;
    if (x.class_stride == 1 && x.pixel_stride == x.classes) {
      const int64_t end = x.offset(image, std::min(next + size, x.pixels));
      for (int64_t j = x.offset(image, next); j < end; j += kLine) __builtin_prefetch(data + j);
    }
    T* const first = data + x.offset(image, p + i);
    for_groups(x.classes, [&]<int64_t n>(int64_t c) {
      move.template operator()<n>(first + c * x.class_stride, c, i, size);
    });
  }
}

/// Copies `pixels` pixels of an image, from pixel p on, into planes.
template <typename T, typename A>
void copy_to_planes(const T* data, const Layout& x, int64_t image, int64_t p, int64_t pixels,
                    Planes<A> planes) {
  for_pieces(data, x, image, p, pixels,
             [&]<int64_t n>(const T* first, int64_t c, int64_t i, int64_t size) {
               const Planes<A> to{planes[c] + i, planes.stride};
               load<n>(first, x.class_stride, x.pixel_stride, size, to);
             });
}

/// The reverse of `copy_to_planes`.
template <typename T, typename A>
void copy_from_planes(Planes<A> planes, T* data, const Layout& x, int64_t image, int64_t p,
                      int64_t pixels) {
  for_pieces(data, x, image, p, pixels,
             [&]<int64_t n>(T* first, int64_t c, int64_t i, int64_t size) {
               const Planes<A> from{planes[c] + i, planes.stride};
               store<n>(from, size, first, x.class_stride, x.pixel_stride);
             });
}

}  // namespace unet_fast::weighted_ce
