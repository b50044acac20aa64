#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "testing/weighted_ce_case.h"

// The CUDA kernels run on the host, NumPy in and NumPy out. Built by the tests, never installed.
namespace py = pybind11;
namespace weighted_ce = unet_fast::weighted_ce;

namespace {

template <typename T>
using Array = py::array_t<T, 0>;  // any strides
template <typename T>
using Contiguous = py::array_t<T, py::array::c_style>;

// logits (N, C, pixels) of any strides, target and weight (N, pixels).
template <typename T, typename Id>
weighted_ce::Problem<T, T> problem(const Array<T>& logits, const Contiguous<Id>& target,
                                   const std::optional<Contiguous<T>>& weight, int64_t reduction,
                                   int64_t ignore_index) {
  const auto stride = [&](int axis) {
    return static_cast<int64_t>(logits.strides(axis)) / static_cast<int64_t>(sizeof(T));
  };
  const unet_fast::Layout layout{logits.shape(0), logits.shape(1), logits.shape(2),
                                 stride(0),       stride(1),       stride(2)};
  return {layout,
          logits.data(),
          target.data(),
          weighted_ce::kIdType<Id>,
          weight ? weight->data() : nullptr,
          ignore_index,
          reduction};
}

template <typename T, typename Id>
py::tuple forward(const Array<T>& logits, const Contiguous<Id>& target,
                  const std::optional<Contiguous<T>>& weight, int64_t reduction,
                  int64_t ignore_index) {
  const auto in = problem<T, Id>(logits, target, weight, reduction, ignore_index);
  const bool per_pixel = reduction == weighted_ce::kNone;
  Contiguous<T> loss(per_pixel ? target.size() : 1);
  double divisor = 0;
  T* const out = loss.mutable_data();
  {
    py::gil_scoped_release release;
    weighted_ce::host_forward(in, out, &divisor);
  }
  return py::make_tuple(loss, divisor);
}

template <typename T, typename Id>
Array<T> backward(const Contiguous<T>& grad, const Array<T>& logits, const Contiguous<Id>& target,
                  const std::optional<Contiguous<T>>& weight, double divisor, int64_t reduction,
                  int64_t ignore_index) {
  const auto in = problem<T, Id>(logits, target, weight, reduction, ignore_index);
  Array<T> out({logits.shape(0), logits.shape(1), logits.shape(2)},
               {logits.strides(0), logits.strides(1), logits.strides(2)});
  T* const to = out.mutable_data();
  const T* const from = grad.data();
  {
    py::gil_scoped_release release;
    weighted_ce::host_backward(in, from, &divisor, to);
  }
  return out;
}

template <typename T, typename Id>
void bind(py::module_& m) {
  m.def("weighted_ce", &forward<T, Id>, py::arg("logits").noconvert(),
        py::arg("target").noconvert(), py::arg("weight"), py::arg("reduction"),
        py::arg("ignore_index"));
  m.def("weighted_ce_backward", &backward<T, Id>, py::arg("grad"), py::arg("logits").noconvert(),
        py::arg("target").noconvert(), py::arg("weight"), py::arg("normaliser"),
        py::arg("reduction"), py::arg("ignore_index"));
}

}  // namespace

PYBIND11_MODULE(_cuda_on_host, m) {
  bind<float, uint8_t>(m);
  bind<float, int16_t>(m);
  bind<float, int32_t>(m);
  bind<float, int64_t>(m);
  bind<double, int64_t>(m);
}
