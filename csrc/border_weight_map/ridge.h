#pragma once

#include <atomic>
#include <vector>

#include "border_weight_map/labels.h"

// The ridge between touching objects, and the target classes; part of cpu.cpp.
namespace unet_fast::border_weight_map {
namespace {

UNET_FAST_SIMD void mark_touching(const int32_t* here, const int32_t* neighbours, int64_t n,
                                  uint8_t* ridge) {
  for (int64_t i = 0; i < n; ++i) ridge[i] |= touches(here[i], neighbours[i]) ? 1 : 0;
}

// A row of object ids with a pixel of background at each end.
struct PaddedRow {
  explicit PaddedRow(int64_t width) : pixels(width + 2) {}
  int32_t* at() { return pixels.data() + 1; }
  std::vector<int32_t> pixels;
};

// Finds the ridge, one row at a time.
class RidgeOfRows {
 public:
  RidgeOfRows(const Labels& labels, const Shape& shape, int64_t ridge)
      : labels_(labels), shape_(shape), ridge_(ridge), here_(shape.width), there_(shape.width) {}

  // Reads the objects of class `c` in row number `row` of the batch; sets `marks` to 1 on the
  // ridge, else to 0.
  const int32_t* read(int64_t row, int32_t c, uint8_t* marks) {
    const int64_t width = shape_.width;
    const int64_t y = row % shape_.height, z = row / shape_.height % shape_.depth;
    labels_.read(row * width, width, c, here_.at());
    std::fill(marks, marks + width, 0);
    if (ridge_ == kNone) return here_.at();
    for (int dz = -1; dz <= 1; ++dz) {
      for (int dy = -1; dy <= 1; ++dy) {
        if (z + dz < 0 || z + dz >= shape_.depth || y + dy < 0 || y + dy >= shape_.height) continue;
        if (dz == 0 && dy == 0) {
          mark(dz, dy, here_, marks);
        } else if (in_ridge(ridge_, dz, dy, -1) || in_ridge(ridge_, dz, dy, 0)) {
          labels_.read((row + dz * shape_.height + dy) * width, width, c, there_.at());
          mark(dz, dy, there_, marks);
        }
      }
    }
    return here_.at();
  }

 private:
  void mark(int dz, int dy, PaddedRow& neighbours, uint8_t* marks) {
    for (int dx = -1; dx <= 1; ++dx) {
      if (!in_ridge(ridge_, dz, dy, dx)) continue;
      mark_touching(here_.at(), neighbours.at() + dx, shape_.width, marks);
    }
  }

  const Labels& labels_;
  const Shape& shape_;
  const int64_t ridge_;
  PaddedRow here_, there_;
};

template <typename Id>
UNET_FAST_SIMD void carve(const Id* in, const uint8_t* ridge, int64_t n, Id* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = ridge[i] != 0 ? Id{0} : in[i];
}

// Operator separate_touching: returns labels, (N, D, H, W), that are 0 on the ridge.
Tensor separate_touching(const Tensor& labels_in, int64_t ridge) {
  const Tensor input = as_contiguous(labels_in);
  const Shape shape(input);
  check_ridge(ridge);
  Tensor result = new_like(input);
  const Labels labels("separate_touching", input, std::nullopt, std::nullopt);
  const int64_t rows = shape.pixels() == 0 ? 0 : shape.pixels() / shape.width;
  torch::stable::parallel_for(0, rows, kRows, [&](int64_t begin, int64_t end) {
    RidgeOfRows ridges(labels, shape, ridge);
    std::vector<uint8_t> marks(shape.width);
    for (int64_t row = begin; row < end; ++row) {
      ridges.read(row, 0, marks.data());
      const int64_t from = row * shape.width;
      dispatch_labels(labels.type, labels.op, [&]<typename Id>() {
        carve(static_cast<const Id*>(labels.data) + from, marks.data(), shape.width,
              static_cast<Id*>(result.data_ptr()) + from);
      });
    }
  });
  labels.check();
  return result;
}

UNET_FAST_SIMD void mark_objects(const int32_t* objects, const uint8_t* ridge, int64_t n,
                                 uint8_t* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = objects[i] != 0 && ridge[i] == 0 ? 1 : 0;
}

UNET_FAST_SIMD int64_t count(const uint8_t* target, int64_t n, int32_t c) {
  int32_t result = 0;
  for (int64_t i = 0; i < n; ++i) result += target[i] == c ? 1 : 0;
  return result;
}

// Pixel counts by image and class.
using Counts = std::vector<std::atomic<int64_t>>;

// Writes the target class of every pixel, and counts classes: `foreground` if given; else the class
// map or, without one, 1 for objects, with 0 on the ridge; kIgnored where ignored.
void find_target(const Labels& labels, const Shape& shape, const bool* foreground,
                 const Settings& settings, uint8_t* target, Counts& counts) {
  const int64_t width = shape.width, classes = settings.classes;
  FirstBad bad;
  torch::stable::parallel_for(0, shape.pixels() / width, kRows, [&](int64_t begin, int64_t end) {
    RidgeOfRows ridges(labels, shape, settings.ridge);
    std::vector<uint8_t> marks(width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = row * width;
      uint8_t* const out = target + from;
      if (foreground != nullptr) {
        std::copy(foreground + from, foreground + from + width, out);
      } else if (labels.classes == nullptr) {
        const int32_t* const objects = ridges.read(row, 0, marks.data());
        mark_objects(objects, marks.data(), width, out);
      } else {
        std::copy(labels.classes + from, labels.classes + from + width, out);
        for (int32_t c = 1; c < classes; ++c) {
          ridges.read(row, c, marks.data());
          carve(out, marks.data(), width, out);
        }
      }
      labels.mark(from, width, out);
      int64_t counted = count(out, width, kIgnored);
      for (int32_t c = 0; c < classes; ++c) {
        const int64_t found = count(out, width, c);
        counts[from / shape.volume() * classes + c] += found;
        counted += found;
      }
      if (counted < width) bad.found(row);
    }
  });
  labels.check();
  if (!bad.any()) return;
  const uint8_t* wrong = target + bad.index.load() * width;
  while (*wrong < classes || *wrong == kIgnored) ++wrong;
  STD_TORCH_CHECK(false, labels.op, ": classes must be in [0, ", classes - 1,
                  "] or 255 (ignored), got ", static_cast<int>(*wrong));
}

}  // namespace
}  // namespace unet_fast::border_weight_map
