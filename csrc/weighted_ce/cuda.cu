#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/stream.h"
#include "weighted_ce/kernels.cuh"
#include "weighted_ce/operands.h"

namespace unet_fast::weighted_ce {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <typename T>
Problem<T, Accumulator<T>> problem(const Operands& in, int64_t reduction, int64_t ignore_index) {
  IntegerType type = IntegerType::kInt64;
  dispatch_ids(in.target.scalar_type(), "weighted_ce",
               [&]<typename Id>() { type = kIntegerType<Id>; });
  return {in.layout, in.logits.const_data_ptr<T>(),    in.target.data_ptr(),
          type,      in.weight_data<Accumulator<T>>(), ignore_index,
          reduction};
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                   const std::optional<Tensor>& weight, int64_t reduction,
                                   int64_t ignore_index) {
  const DeviceGuard guard(logits.get_device_index());
  const Operands in(logits, target, weight, reduction);
  Tensor loss = new_loss(logits, target, reduction);
  Tensor divisor = new_normaliser(logits);
  const cudaStream_t stream = current_stream(logits);
  dispatch_floating(logits.scalar_type(), "weighted_ce", [&]<typename T>() {
    const auto p = problem<T>(in, reduction, ignore_index);
    // Each Sums is three doubles.
    const Tensor partial =
        new_tensor(logits, {reduction == kNone ? 0 : p.blocks(), 3}, aoti_torch_dtype_float64());
    launch_forward(p, loss.mutable_data_ptr<Accumulator<T>>(), divisor.mutable_data_ptr<double>(),
                   reinterpret_cast<Sums*>(partial.mutable_data_ptr<double>()), stream);
  });
  return {loss, divisor};
}

Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                const std::optional<Tensor>& weight, const Tensor& divisor, int64_t reduction,
                int64_t ignore_index) {
  const DeviceGuard guard(logits.get_device_index());
  const Operands in(logits, target, weight, reduction);
  const Tensor upstream = as_contiguous(grad);
  in.check_upstream(upstream, divisor, reduction);
  Tensor out = new_like(logits);
  if (out.numel() == 0) return out;
  Output result(out);
  const cudaStream_t stream = current_stream(logits);
  dispatch_floating(logits.scalar_type(), "weighted_ce_backward", [&]<typename T>() {
    launch_backward(problem<T>(in, reduction, ignore_index),
                    upstream.const_data_ptr<Accumulator<T>>(), divisor.const_data_ptr<double>(),
                    result.layout, result.tensor.mutable_data_ptr<T>(), stream);
  });
  result.finish(out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unet_fast, CUDA, m) {
  m.impl("weighted_ce", TORCH_BOX(&forward));
  m.impl("weighted_ce_backward", TORCH_BOX(&backward));
}

}  // namespace unet_fast::weighted_ce
