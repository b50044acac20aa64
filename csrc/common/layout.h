#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace unet_fast {

/// Memory layout of an (N, C, *spatial) tensor, its spatial axes flattened into one axis of pixels.
/// Strides and offsets are in elements. Contiguous: pixel_stride 1; channels-last: class_stride 1.
struct Layout {
  int64_t images, classes, pixels;
  int64_t image_stride, class_stride, pixel_stride;

  UNET_FAST_HOST_DEVICE int64_t offset(int64_t image, int64_t pixel) const {
    return image * image_stride + pixel * pixel_stride;
  }
};

}  // namespace unet_fast
