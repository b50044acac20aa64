#pragma once

#include "testing/cuda_on_host.h"
// The stand-ins for CUDA, above, must come first.
#include "border_weight_map/kernels.cuh"

namespace unet_fast::border_weight_map {

/// Runs two_nearest on the host, with squared distances of type D. All pointers hold one value per
/// pixel.
template <typename D>
void host_two_nearest(const Labels& labels, const double (&spacing)[3], float* first,
                      float* second) {
  cuda_on_host::DeviceMemory<Nearest<D>> nearest(labels.pixels());
  cuda_on_host::DeviceMemory<Nearest<D>> spare(labels.depth > 1 ? labels.pixels() : 0);
  launch_transform<D>(labels, 0, spacing, Reaches<D>::unlimited(), nearest.data(), spare.data(),
                      Distances{first, second}, cuda_on_host::Stream{});
}

template <typename Id>
void host_separate(const Labels& labels, int64_t ridge, Id* out) {
  launch(&separate<Id>, blocks_of(labels.pixels()), kThreads, cuda_on_host::Stream{}, labels, ridge,
         out);
}

template <typename D>
void host_map(const Labels& labels, const bool* foreground, const MapSettings& settings,
              uint8_t* target, float* weights) {
  cuda_on_host::DeviceMemory<Nearest<D>> nearest(labels.pixels());
  cuda_on_host::DeviceMemory<Nearest<D>> spare(labels.depth > 1 ? labels.pixels() : 0);
  cuda_on_host::DeviceMemory<unsigned long long> counts(labels.images * settings.classes);
  cuda_on_host::DeviceMemory<float> of_classes(labels.images * settings.classes);
  launch_map<D>(labels, foreground, settings, counts.data(), of_classes.data(), nearest.data(),
                spare.data(), target, weights, cuda_on_host::Stream{});
}

inline void host_packed_map(const Labels& labels, const bool* foreground,
                            const MapSettings& settings, uint8_t* target, float* weights) {
  cuda_on_host::DeviceMemory<Notes> notes(labels.images);
  cuda_on_host::DeviceMemory<Keys<uint32_t>> nearest(labels.pixels());
  launch_packed(labels, foreground, settings, notes.data(), nearest.data(), target, weights,
                cuda_on_host::Stream{});
}

}  // namespace unet_fast::border_weight_map
