#pragma once

#include "border_weight_map/packed.cuh"
#include "border_weight_map/target.cuh"

namespace unet_fast::border_weight_map {

// ---- The weight of each class in each image

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

// The most segments of rows that a column is cut into.
constexpr int kSegments = 32;

// Goes on with a sweep past a segment, of which `met` is the sweep.
__device__ inline void pass(Met& sweep, const Met& met) {
  sweep.meet(met.other, met.other_at);
  sweep.meet(met.label, met.at);
}

// Finds the two nearest objects within columns. A block has blockDim.x columns, each in blockDim.y
// segments, a thread for each. Every thread sweeps its segment down and up; then, from what the
// segments above and below have met, it sweeps again and writes.
template <typename D>
__global__ void __launch_bounds__(kThreads, 2)
    sweep(Labels labels, int32_t c, D scale, Nearest<D>* nearest) {
  // Of integers, as what is shared cannot have a constructor.
  __shared__ int32_t memory[2 * kThreads * sizeof(Met) / sizeof(int32_t)];
  Met *const above = reinterpret_cast<Met*>(memory), *const below = above + kThreads;
  const int columns = blockDim.x, segments = blockDim.y;
  const int column = threadIdx.x, segment = threadIdx.y;
  const int64_t width = labels.width, height = labels.height;
  const int64_t strips = (width + columns - 1) / columns;
  const int64_t slice = blockIdx.x / strips, x = blockIdx.x % strips * columns + column;
  const int64_t rows = (height + segments - 1) / segments;
  const int64_t end = x < width ? height : 0;  // no rows beside the image
  const int64_t top = segment * rows < end ? segment * rows : end;
  const int64_t bottom = top + rows < end ? top + rows : end;
  const int64_t first = slice * height * width + x;
  Met down, up;
  if (segments > 1) {
    for (int64_t y = top; y < bottom; ++y) {
      down.meet(labels.object(first + y * width, c), static_cast<int32_t>(y));
    }
    for (int64_t y = bottom - 1; y >= top; --y) {
      up.meet(labels.object(first + y * width, c), static_cast<int32_t>(height - 1 - y));
    }
    above[segment * columns + column] = down;
    below[segment * columns + column] = up;
    __syncthreads();
    down = up = {};
    for (int s = 0; s < segment; ++s) pass(down, above[s * columns + column]);
    for (int s = segments - 1; s > segment; --s) pass(up, below[s * columns + column]);
  }
  for (int64_t y = top; y < bottom; ++y) {
    const int64_t i = first + y * width;
    const int32_t row = static_cast<int32_t>(y);
    down.meet(labels.object(i, c), row);
    nearest[i] = {squared(row - down.at, scale), squared(row - down.other_at, scale), down.label,
                  down.other};
  }
  for (int64_t y = bottom - 1; y >= top; --y) {
    const int64_t i = first + y * width;
    const int32_t row = static_cast<int32_t>(height - 1 - y);
    up.meet(labels.object(i, c), row);
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
  // As many segments as keep a large device busy, of 16 rows or more.
  const int64_t slices = labels.images * labels.depth;
  unsigned segments = 1;
  while (segments < kSegments && slices * labels.width * segments < 1 << 16 &&
         labels.height > 16 * segments) {
    segments *= 2;
  }
  const unsigned columns = kThreads / segments;
  const int64_t strips = (labels.width + columns - 1) / columns;
  launch(&sweep<D>, static_cast<unsigned>(slices * strips), dim3(columns, segments), stream, labels,
         c, scale(spacing[1]), nearest);
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

/// Writes targets and weights. `counts`, used for balanced weights, and `of_classes` hold one value
/// per image and class; `nearest` and `spare` are as in launch_transform.
template <typename D, typename Stream>
void launch_map(const Labels& labels, const bool* foreground, const MapSettings& settings,
                unsigned long long* counts, float* of_classes, Nearest<D>* nearest,
                Nearest<D>* spare, uint8_t* target, float* weights, Stream stream) {
  const unsigned images = static_cast<unsigned>(labels.images);
  const unsigned classes = static_cast<unsigned>(settings.classes);
  const int64_t n = labels.images * settings.classes;
  if (settings.balanced) {
    launch(&clear<unsigned long long>, blocks_of(n), kThreads, stream, counts, n);
  }
  const int64_t blocks = (labels.volume() + kThreads - 1) / kThreads;
  launch(&find_target, static_cast<unsigned>(labels.images * blocks), kThreads, stream, labels,
         foreground, settings.classes, settings.ridge, blocks, target,
         settings.balanced ? counts : nullptr);
  if (settings.balanced) {
    launch(&balance, images, classes, stream, counts, of_classes);
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
