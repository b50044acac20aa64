#pragma once

#include "elastic_deform/tile.cuh"

// CUDA kernels and launchers of the deformation.
namespace unet_fast::elastic_deform {

// Calls `fn.operator()<order>()` with the order of a channel.
template <int lean, typename Fn>
__device__ void with_order(const Orders& orders, int c, Fn&& fn) {
  if constexpr (lean != kGeneral) {
    fn.template operator()<lean>();
  } else if (orders.at(c) == 3) {
    fn.template operator()<3>();
  } else if (orders.at(c) == 1) {
    fn.template operator()<1>();
  } else {
    fn.template operator()<0>();
  }
}

// Elements between neighbours along an axis; in lean kernels the pixels of a line lie side by side.
template <int lean, int axes>
__device__ Offset<lean> step_of(const Strides<axes>& strides, int axis) {
  return lean != kGeneral && axis == axes - 1 ? 1 : static_cast<Offset<lean>>(strides.along[axis]);
}

// The distance of a place from the first pixel of its channel.
template <int lean, int axes>
__device__ Offset<lean> offset_of(const Strides<axes>& strides, const int32_t (&place)[axes]) {
  Offset<lean> result = 0;
  for (int axis = 0; axis < axes; ++axis) result += place[axis] * step_of<lean>(strides, axis);
  return result;
}

// The values around a pixel of a channel, for `interpolate`.
template <int order, int lean, typename T, int axes>
struct Around {
  const T* channel;
  Offset<lean> first = 0, step[axes];

  template <typename A>
  __device__ Around(const T* channel, const Strides<axes>& strides, const Pixel<A, axes>& p)
      : channel(channel) {
    for (int axis = 0; axis < axes; ++axis) {
      step[axis] = step_of<lean>(strides, axis);
      first += (p.site[axis].pixel - kBefore<order>)*step[axis];
    }
    for (int axis = 0; axis < axes && order == 0; ++axis) {
      if (rounds_up(p.site[axis])) first += step[axis];
    }
  }
  template <typename... Places>
  __device__ T operator()(Places... places) const {
    const int at[]{places...};
    Offset<lean> index = first;
    for (int axis = 0; axis < axes; ++axis) index += at[axis] * step[axis];
    return channel[index];
  }
  __device__ T nearest() const { return channel[first]; }
};

// What a channel has at the site of a pixel.
template <int order, int lean, typename T, typename A, int axes>
__device__ A value_at(const T* channel, const Strides<axes>& strides, const Pixel<A, axes>& p) {
  Weights<order, axes, A> w;
  p.template weigh<order>(w);
  const Around<order, lean, T, axes> values(channel, strides, p);
  return interpolate<order, axes>(
      w, w, [&](auto... places) { return static_cast<A>(values(places...)); });
}

// Calls `fn.operator()<order>(channel, strides)` with the order of a channel and what it reads:
// `pixels`, a channel of image `n`, or spline coefficients.
template <int lean, typename T, typename A, int axes, typename Fn>
__device__ void with_channel(const Image<T, A, axes>& image, const T* pixels, int64_t n, int c,
                             Fn&& fn) {
  with_order<lean>(image.orders, c, [&]<int order>() {
    if constexpr (order == 3) {
      fn.template operator()<order>(image.smooth.channel(n, c), image.smooth.strides);
    } else {
      fn.template operator()<order>(pixels, image.pixels.strides);
    }
  });
}

// Calls `fn.operator()<Id>()` with an integer type of so many bytes; not for 0 bytes.
template <typename Fn>
__device__ void with_width(int64_t bytes, Fn&& fn) {
  const int width = static_cast<int>(bytes);
  if (width & 4) {
    fn.template operator()<uint32_t>();
  } else if (width & 8) {
    fn.template operator()<uint64_t>();
  } else if (width & 2) {
    fn.template operator()<uint16_t>();
  } else if (width & 1) {
    fn.template operator()<uint8_t>();
  }
}

// What lies some bytes behind the start of an array.
template <typename T>
__device__ T* behind(std::conditional_t<std::is_const_v<T>, const void, void>* start,
                     int64_t bytes) {
  using Char = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(static_cast<Char*>(start) + bytes);
}

// Bytes per pixel: sizeof(T) for each channel and the label, read (mostly once, as neighbours share
// what they read) and written.
template <typename T, typename A, int axes, int lean>
__global__ void __launch_bounds__(kWide* kWarps, kBlocks<A, axes, lean>)
    deform(Movement<axes> m, Image<T, A, axes> image, Strides<axes> to, T* out,
           LabelWindow<axes> labels) {
  __shared__ Tile<A, axes, lean> tile;
  // Where this image and its labels start; from memory, so that the loop does not compute it anew.
  __shared__ int64_t starts[5];
  set_up(m, tile, [&](int64_t n, int64_t source) {
    starts[0] = source;
    starts[1] = source * image.pixels.strides.image * sizeof(T);
    starts[2] = n * to.image * sizeof(T);
    starts[3] = source * labels.strides.image * labels.bytes;
    starts[4] = n * labels.window.pixels() * labels.bytes;
  });
  const int64_t source = starts[0];
  const auto* const from = behind<const T>(image.pixels.data, starts[1]);
  auto* const made = behind<T>(out, starts[2]);
  const auto* const ids = behind<const char>(labels.data, starts[3]);
  auto* const moved = behind<char>(labels.out, starts[4]);
  constexpr int kDown = axes - 2;
  int32_t place[axes];
  place_of(tile, 0, place);
  const Offset<lean> first = offset_of<lean>(to, place);
  // Where this column enters the window of the labels: its first row, how many rows it has there,
  // and the index of the tile's first row.
  bool taken = true;
  Offset<lean> window = 0;
  for (int axis = 0; axis < axes; ++axis) {
    const auto at = place[axis] - static_cast<int32_t>(labels.margin[axis]);
    const auto side = static_cast<int32_t>(labels.window[axis]);
    if (axis != kDown) taken &= static_cast<uint32_t>(at) < static_cast<uint32_t>(side);
    window = window * side + at;
  }
  const int above = static_cast<int32_t>(labels.margin[kDown]) - place[kDown];
  const auto height = static_cast<uint32_t>(taken ? labels.window[kDown] : 0);
  // What is read waits for memory: labels, and values of two pixels, do so at the same time.
  constexpr int kPair = 2;
  march<kPair>(m, tile, [&](Pixel<A, axes>(&pixels)[kPair]) {
    locate(m, tile, pixels);
    const bool all_read = (pixels[0].state | pixels[1].state) == kRead;
    uint64_t id[kPair];
    with_width(labels.bytes, [&]<typename Id>() {
      for (int j = 0; j < kPair; ++j) {
        const auto* const channel = reinterpret_cast<const Id*>(ids);
        const Around<0, lean, Id, axes> around(channel, labels.strides, pixels[j]);
        id[j] = pixels[j].state == kRead ? around.nearest() : Id(0);
      }
    });
    const auto take = [&](int c) {
      A values[kPair];
      const T* const channel = from + c * static_cast<Offset<lean>>(image.pixels.strides.channel);
      with_channel<lean>(image, channel, source, c,
                         [&]<int order>(const auto* of, const auto& strides) {
                           for (int j = 0; j < kPair; ++j)
                             values[j] = value_at<order, lean>(of, strides, pixels[j]);
                         });
      if (!all_read) [[unlikely]] {
        for (int j = 0; j < kPair; ++j) {
          if (pixels[j].state != kRead)
            values[j] = pixels[j].state == kOutside ? image.cval : static_cast<A>(kNoNumber);
        }
      }
      if (image.curves) {
        for (A& value : values) value = image.curves.at(tile.image, c)(value);
      }
      T* const to_channel = made + c * static_cast<Offset<lean>>(to.channel);
      for (int j = 0; j < kPair; ++j) {
        if (j == 0 || place[kDown] + pixels[j].row < static_cast<int32_t>(m.output[kDown])) {
          to_channel[first + pixels[j].row * step_of<lean>(to, kDown)] = stored<T>(values[j]);
        }
      }
    };
    if (static_cast<int>(image.channels) == 1) {
      take(0);  // without a loop
    } else {
      for (int c = 0; c < image.channels; ++c) take(c);
    }
    with_width(labels.bytes, [&]<typename Id>() {
      for (int j = 0; j < kPair; ++j) {
        if (static_cast<uint32_t>(pixels[j].row - above) < height) {
          const auto side = static_cast<Offset<lean>>(labels.window.step(kDown));
          reinterpret_cast<Id*>(moved)[window + pixels[j].row * side] = static_cast<Id>(id[j]);
        }
      }
    });
  });
}

// --- Launchers ---------------------------------------------------------------------------------

template <int axes>
dim3 tiles(const Movement<axes>& m) {
  return dim3(static_cast<unsigned>(m.images * m.depth()) * tiles_along(m.output[axes - 2], kHigh) *
              tiles_along(m.output[axes - 1], kWide));
}
inline const dim3 kTileThreads(kWide, kWarps);

// Whether the lines of images are contiguous, and the pixels of a channel less than 2^31 elements
// from its first one, as the channel behind it.
template <int axes>
bool is_near(const Strides<axes>& strides, const Sides<axes>& sides) {
  double farthest = 0;
  for (int axis = 0; axis < axes; ++axis) {
    farthest += static_cast<double>(sides[axis]) * static_cast<double>(strides.along[axis]);
  }
  return strides.along[axes - 1] == 1 && farthest < INT32_MAX && strides.channel < INT32_MAX;
}

// The order of the lean kernels, if they can work on an image and what is made of it, or kGeneral.
template <typename T, typename A, int axes>
int lean_order(const Movement<axes>& m, const Image<T, A, axes>& image, const Strides<axes>& made) {
  const int order = image.orders.at(0);
  for (int c = 1; c < image.channels; ++c) {
    if (image.orders.at(c) != order) return kGeneral;
  }
  const bool lean = order < 3 && kWide * m.field[axes - 1].scale <= kWindow - 4 &&
                    kHigh * m.field[axes - 2].scale <= kWindow - 4 &&
                    is_near(image.pixels.strides, m.input) && is_near(made, m.output);
  return lean ? order : kGeneral;
}

/// Deforms images and labels; to be called after launch_prepare.
template <typename T, typename A, int axes, typename Stream>
void launch_deform(const Movement<axes>& m, const Image<T, A, axes>& image, const Strides<axes>& to,
                   T* out, LabelWindow<axes> labels, Stream stream) {
  labels.margin = margin_of(labels.window, m.output);
  const bool near = labels.bytes == 0 || is_near(labels.strides, m.input);
  const int lean = near ? lean_order(m, image, to) : kGeneral;
  launch(lean == 1   ? &deform<T, A, axes, 1>
         : lean == 0 ? &deform<T, A, axes, 0>
                     : &deform<T, A, axes, kGeneral>,
         tiles(m), kTileThreads, stream, m, image, to, out, labels);
}

}  // namespace unet_fast::elastic_deform
