#pragma once

#include "border_weight_map/numerics.h"
#include "common/cuda.cuh"
#include "common/types.h"

// Labels, settings, the ridge and the target classes on CUDA; part of kernels.cuh.
namespace unet_fast::border_weight_map {

// A batch of volumes, (N, D, H, W), and its labels.
struct Labels {
  int64_t images, depth, height, width;
  const void* data;
  IntegerType type;
  const uint8_t* classes;  // the class of each pixel, or null
  bool ignores;
  int64_t ignore_label;

  __host__ __device__ int64_t volume() const { return depth * height * width; }
  __host__ __device__ int64_t pixels() const { return images * volume(); }

  __device__ int64_t id(int64_t i) const {
    switch (type) {
      case IntegerType::kInt8:
        return static_cast<const int8_t*>(data)[i];
      case IntegerType::kUint8:
        return static_cast<const uint8_t*>(data)[i];
      case IntegerType::kInt16:
        return static_cast<const int16_t*>(data)[i];
      case IntegerType::kUint16:
        return static_cast<const uint16_t*>(data)[i];
      case IntegerType::kInt32:
        return static_cast<const int32_t*>(data)[i];
      default:
        return static_cast<const int64_t*>(data)[i];
    }
  }
  __device__ bool ignored(int64_t i) const { return ignores && id(i) == ignore_label; }

  // The object at pixel i if it is of class `c` (of any class without a class map), else 0.
  __device__ int32_t object(int64_t i, int32_t c) const {
    if (classes != nullptr && classes[i] != c) return 0;
    const int64_t label = id(i);
    if (ignores && label == ignore_label) return 0;
    assert(label >= 0 && label <= kMaxLabel && "labels must be in [0, 2147483647]");
    return static_cast<int32_t>(label);
  }
};

struct ClassWeights {
  float at[kMaxClasses];
};

/// Settings of a weight map, as the kernels take them.
struct MapSettings {
  int32_t classes;
  int64_t ridge;
  Terms terms;
  bool everywhere;
  double spacing[3];
  ClassWeights class_weights;  // of all images, if not given or balanced
  const float* given;          // class weights on the device, or null
  bool balanced;
};

// ---- The ridge between touching objects, and the target classes

// Whether a pixel of class `c` is part of the ridge.
__device__ inline bool on_ridge(const Labels& labels, int64_t i, int32_t c, int64_t ridge) {
  if (ridge == kNone) return false;
  const int32_t here = labels.object(i, c);
  const int64_t x = i % labels.width, y = i / labels.width % labels.height;
  const int64_t z = i / (labels.width * labels.height) % labels.depth;
  if (here == 0) return false;
  for (int dz = -1; dz <= 1; ++dz) {
    for (int dy = -1; dy <= 1; ++dy) {
      for (int dx = -1; dx <= 1; ++dx) {
        if (!in_ridge(ridge, dz, dy, dx)) continue;
        if (z + dz < 0 || z + dz >= labels.depth || y + dy < 0 || y + dy >= labels.height ||
            x + dx < 0 || x + dx >= labels.width) {
          continue;
        }
        const int64_t j = i + (dz * labels.height + dy) * labels.width + dx;
        if (touches(here, labels.object(j, c))) return true;
      }
    }
  }
  return false;
}

template <typename Id>
__global__ void separate(Labels labels, int64_t ridge, Id* out) {
  const int64_t i = thread_index();
  if (i >= labels.pixels()) return;
  const Id id = static_cast<const Id*>(labels.data)[i];
  labels.object(i, 0);  // checks the id
  out[i] = on_ridge(labels, i, 0, ridge) ? Id(0) : id;
}

// The target class of a pixel, by the same rules as find_target on the CPU.
__device__ inline int32_t target_of(const Labels& labels, int64_t i, const bool* foreground,
                                    int64_t ridge) {
  if (labels.ignored(i)) return kIgnored;
  if (foreground != nullptr) return foreground[i] ? 1 : 0;
  const int32_t c = labels.classes != nullptr ? labels.classes[i] : labels.object(i, 0) != 0;
  return c != 0 && c != kIgnored && on_ridge(labels, i, c, ridge) ? 0 : c;
}

// Writes the target class of every pixel and counts the pixels of each class in each image;
// `blocks` blocks per image. Counts are integers, so the order of the atomic additions does not
// matter.
__global__ void find_target(Labels labels, const bool* foreground, int32_t classes, int64_t ridge,
                            int64_t blocks, uint8_t* target, unsigned long long* counts) {
  __shared__ unsigned in_block[kThreads];  // counts by class
  static_assert(kMaxClasses <= kThreads);
  in_block[threadIdx.x] = 0;
  __syncthreads();
  const int64_t image = blockIdx.x / blocks;
  const int64_t in_image = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (in_image < labels.volume()) {
    const int64_t i = image * labels.volume() + in_image;
    const int32_t result = target_of(labels, i, foreground, ridge);
    assert((result < classes || result == kIgnored) && "classes must be in [0, num_classes - 1]");
    target[i] = static_cast<uint8_t>(result);
    if (counts != nullptr && result != kIgnored) atomicAdd(&in_block[result], 1u);
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (counts != nullptr && c < classes && in_block[c] > 0) {
    atomicAdd(&counts[image * classes + c], static_cast<unsigned long long>(in_block[c]));
  }
  __syncthreads();
}

}  // namespace unet_fast::border_weight_map
