#pragma once

#include "border_weight_map/numerics.h"
#include "common/cuda.cuh"
#include "common/types.h"

namespace unet_fast::border_weight_map {

// Rows that a thread sweeps if objects count only up to a limited distance.
constexpr int64_t kSegment = 64;

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

// ---- The weight of each class in each image

struct ClassWeights {
  float at[kMaxClasses];
};

__global__ void set_class_weights(ClassWeights weights, const float* given, float* out) {
  const int c = threadIdx.x;
  out[blockIdx.x * blockDim.x + c] = given != nullptr ? given[c] : weights.at[c];
}

__global__ void balance(const unsigned long long* counts, float* out) {
  const unsigned long long* const of_image = counts + blockIdx.x * blockDim.x;
  int64_t total = 0, present = 0;
  for (unsigned c = 0; c < blockDim.x; ++c) {
    total += static_cast<int64_t>(of_image[c]);
    present += of_image[c] > 0 ? 1 : 0;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      balanced_weight(static_cast<int64_t>(of_image[threadIdx.x]), total, present);
}

// ---- Distances

// Sweeps a column down and up for the rows of one segment, one thread per segment. Objects more
// than `margin` rows outside the segment are not met.
template <typename D>
__global__ void sweep(Labels labels, int32_t c, int64_t segment, int64_t margin, D scale,
                      Nearest<D>* nearest) {
  const int64_t segments = (labels.height + segment - 1) / segment;
  const int64_t thread = thread_index();
  if (thread >= labels.images * labels.depth * segments * labels.width) return;
  const int64_t x = thread % labels.width, slice = thread / labels.width / segments;
  const int64_t top = thread / labels.width % segments * segment;
  const int64_t bottom = top + segment < labels.height ? top + segment : labels.height;
  const int64_t above = top < margin ? 0 : top - margin;
  const int64_t below = labels.height - bottom < margin ? labels.height : bottom + margin;
  const int64_t column = slice * labels.height * labels.width + x;
  Met down;
  for (int64_t y = above; y < bottom; ++y) {
    const int64_t i = column + y * labels.width;
    const int32_t row = static_cast<int32_t>(y);
    down.meet(labels.object(i, c), row);
    if (y < top) continue;
    nearest[i] = {squared(row - down.at, scale), squared(row - down.other_at, scale), down.label,
                  down.other};
  }
  Met up;
  for (int64_t y = below - 1; y >= top; --y) {
    const int64_t i = column + y * labels.width;
    const int32_t row = static_cast<int32_t>(labels.height - 1 - y);
    up.meet(labels.object(i, c), row);
    if (y >= bottom) continue;
    Nearest<D> found = nearest[i];
    found.add(squared(row - up.at, scale), up.label);
    found.add(squared(row - up.other_at, scale), up.other);
    nearest[i] = found;
  }
}

// Sink that keeps the nearest objects for the search along the next axis.
template <typename D>
struct Kept {
  Nearest<D>* out;

  __device__ bool needed(int64_t) const { return true; }
  __device__ void write(int64_t i, const Nearest<D>& nearest) const { out[i] = nearest; }
};

// Sink that writes the distances.
struct Distances {
  float *first, *second;

  __device__ bool needed(int64_t) const { return true; }
  template <typename D>
  __device__ void write(int64_t i, const Nearest<D>& nearest) const {
    first[i] = root(nearest.first);
    second[i] = root(nearest.second);
  }
};

// Sink that writes weights: class weights plus the border and halo terms.
struct Weights {
  const float* of_classes;  // class weights, (images, classes)
  int64_t volume;           // pixels per image
  int32_t classes;
  Terms terms;
  bool everywhere, adds;  // adds: `out` holds the weights of earlier classes
  const uint8_t* target;
  float* out;

  __device__ bool needed(int64_t i) const { return gets_border(target[i], everywhere); }
  template <typename D>
  __device__ void write(int64_t i, const Nearest<D>& nearest) const {
    const int32_t c = target[i];
    float weight = 0;
    if (adds) {
      weight = out[i];
    } else if (c != kIgnored) {
      weight = of_classes[i / volume * classes + c];
    }
    if (needed(i)) weight += terms.border(root(nearest.first) + root(nearest.second));
    if (c == 0 && terms.halo.height > 0) weight += terms.halo(root(nearest.first));
    out[i] = weight;
  }
};

// Searches outward from each pixel, along lines of `n` pixels `stride` apart, until no farther
// object can change the result.
template <typename D, typename Sink>
__global__ void search(const Nearest<D>* nearest, int64_t pixels, int64_t n, int64_t stride,
                       D scale, Reach<D> reach, Sink sink) {
  const int64_t i = thread_index();
  if (i >= pixels) return;
  Nearest<D> found = nearest[i];
  if (sink.needed(i)) {
    const int64_t before = i / stride % n, after = n - 1 - before;
    const int64_t steps = before > after ? before : after;
    for (int64_t step = 1; step <= steps; ++step) {
      const D near = squared(static_cast<int32_t>(step), scale);
      if (near >= reach.bound(near, found.first, found.second)) break;
      if (step <= before) found.add(nearest[i - step * stride], near);
      if (step <= after) found.add(nearest[i + step * stride], near);
    }
  }
  sink.write(i, found);
}

// ---- Launches

/// Passes the two nearest objects of class `c` of every pixel to `sink`. `nearest` and `spare` hold
/// one value per pixel; `spare` is used for volumes only.
template <typename D, typename Sink, typename Stream>
void launch_transform(const Labels& labels, int32_t c, const double (&spacing)[3],
                      const Reaches<D>& reaches, Nearest<D>* nearest, Nearest<D>* spare, Sink sink,
                      Stream stream) {
  const auto scale = [](double size) { return static_cast<D>(size * size); };
  const double rows = reaches.most / spacing[1];
  const bool limited = rows < static_cast<double>(labels.height);
  const int64_t margin = limited ? static_cast<int64_t>(rows) + 1 : labels.height;
  const int64_t segment = limited ? kSegment : labels.height;
  const int64_t segments = (labels.height + segment - 1) / segment;
  launch(&sweep<D>, blocks_of(labels.images * labels.depth * segments * labels.width), kThreads,
         stream, labels, c, segment, margin, scale(spacing[1]), nearest);
  const int64_t n = labels.pixels();
  if (labels.depth == 1) {
    launch(&search<D, Sink>, blocks_of(n), kThreads, stream, nearest, n, labels.width, int64_t{1},
           scale(spacing[2]), reaches.last, sink);
  } else {
    launch(&search<D, Kept<D>>, blocks_of(n), kThreads, stream, nearest, n, labels.width,
           int64_t{1}, scale(spacing[2]), reaches.other, Kept<D>{spare});
    launch(&search<D, Sink>, blocks_of(n), kThreads, stream, spare, n, labels.depth,
           labels.height * labels.width, scale(spacing[0]), reaches.last, sink);
  }
}

/// Settings of a weight map, as the kernels take them.
struct MapSettings {
  int32_t classes;
  int64_t ridge;
  Terms terms;
  bool everywhere;
  double spacing[3];
  ClassWeights class_weights;  // of all images, if `given` and `counts` are null
  const float* given;          // class weights on the device, or null
  unsigned long long* counts;  // for balanced weights: room for (images, classes); else null
};

/// Writes targets and weights. `of_classes` holds one value per image and class; `nearest` and
/// `spare` are as in launch_transform.
template <typename D, typename Stream>
void launch_map(const Labels& labels, const bool* foreground, const MapSettings& settings,
                float* of_classes, Nearest<D>* nearest, Nearest<D>* spare, uint8_t* target,
                float* weights, Stream stream) {
  const unsigned images = static_cast<unsigned>(labels.images);
  const unsigned classes = static_cast<unsigned>(settings.classes);
  const int64_t n = labels.images * settings.classes;
  if (settings.counts != nullptr) {
    launch(&clear<unsigned long long>, blocks_of(n), kThreads, stream, settings.counts, n);
  }
  const int64_t blocks = (labels.volume() + kThreads - 1) / kThreads;
  launch(&find_target, static_cast<unsigned>(labels.images * blocks), kThreads, stream, labels,
         foreground, settings.classes, settings.ridge, blocks, target, settings.counts);
  if (settings.counts != nullptr) {
    launch(&balance, images, classes, stream, settings.counts, of_classes);
  } else {
    launch(&set_class_weights, images, classes, stream, settings.class_weights, settings.given,
           of_classes);
  }
  for (int32_t c = 1; c < settings.classes; ++c) {
    const Weights sink{of_classes,          labels.volume(), settings.classes, settings.terms,
                       settings.everywhere, c > 1,           target,           weights};
    launch_transform<D>(labels, c, settings.spacing, settings.terms.reaches<D>(), nearest, spare,
                        sink, stream);
  }
}

}  // namespace unet_fast::border_weight_map
