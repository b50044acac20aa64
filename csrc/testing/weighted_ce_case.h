#pragma once

#include <stdexcept>
#include <vector>

#include "testing/cuda_on_host.h"
// The stand-ins for CUDA, above, must come first.
#include "weighted_ce/kernels.cuh"

namespace unet_fast::weighted_ce {

/// Runs the forward kernels on the host. `loss` has one value, or one per pixel for kNone.
template <typename T, typename A>
void host_forward(const Problem<T, A>& in, A* loss, double* divisor) {
  cuda_on_host::DeviceMemory<Partial> partial(in.blocks());
  unsigned arrived = 0;
  const cuda_on_host::Visible shown(&arrived, sizeof arrived, true);
  launch_forward(in, {loss, divisor, partial.data(), &arrived}, cuda_on_host::Stream{});
  if (arrived != 0) throw std::logic_error("the last block leaves `arrived` at 0");
}

template <typename T, typename A>
void host_backward(const Problem<T, A>& in, const A* grad, const double* divisor, T* out) {
  launch_backward(in, grad, divisor, in.layout, out, cuda_on_host::Stream{});
}

}  // namespace unet_fast::weighted_ce
