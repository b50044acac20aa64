#pragma once

#include "testing/cuda_on_host.h"
// The stand-ins for CUDA, above, must come first.
#include "weighted_ce/kernels.cuh"

namespace unet_fast::weighted_ce {

/// Runs the forward kernels on the host. `loss` has one value, or one per pixel for kNone.
template <typename T, typename A>
void host_forward(const Problem<T, A>& in, A* loss, double* divisor) {
  std::vector<Sums> partial(in.blocks());
  launch_forward(in, loss, divisor, partial.data(), cuda_on_host::Stream{});
}

template <typename T, typename A>
void host_backward(const Problem<T, A>& in, const A* grad, const double* divisor, T* out) {
  launch_backward(in, grad, divisor, in.layout, out, cuda_on_host::Stream{});
}

}  // namespace unet_fast::weighted_ce
