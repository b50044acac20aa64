#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <vector>

#include "testing/border_weight_map_case.h"
#include "testing/elastic_deform_case.h"
#include "testing/weighted_ce_case.h"

// Python module that runs the CUDA kernels on the host, with NumPy arrays. Built by the tests,
// never installed.
namespace py = pybind11;
namespace border_weight_map = unet_fast::border_weight_map;
namespace elastic_deform = unet_fast::elastic_deform;
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
          unet_fast::kIntegerType<Id>,
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

template <typename Id>
border_weight_map::Labels labels_of(const Contiguous<Id>& labels,
                                    const std::optional<Contiguous<uint8_t>>& classes,
                                    std::optional<int64_t> ignore_label) {
  return {labels.shape(0),
          labels.shape(1),
          labels.shape(2),
          labels.shape(3),
          labels.data(),
          unet_fast::kIntegerType<Id>,
          classes ? classes->data() : nullptr,
          ignore_label.has_value(),
          ignore_label.value_or(0)};
}

template <typename T>
Contiguous<T> like(const py::array& x) {
  return Contiguous<T>(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
}

using Spacing = std::array<double, 3>;

// labels (N, D, H, W). `exact`: squared distances are int32_t, else double.
template <typename Id>
py::tuple two_nearest(const Contiguous<Id>& labels, const Spacing& spacing, bool exact) {
  const auto in = labels_of<Id>(labels, std::nullopt, std::nullopt);
  auto first = like<float>(labels), second = like<float>(labels);
  float *const to = first.mutable_data(), *const to_second = second.mutable_data();
  const double sizes[3] = {spacing[0], spacing[1], spacing[2]};
  {
    py::gil_scoped_release release;
    exact ? border_weight_map::host_two_nearest<int32_t>(in, sizes, to, to_second)
          : border_weight_map::host_two_nearest<double>(in, sizes, to, to_second);
  }
  return py::make_tuple(first, second);
}

template <typename Id>
Contiguous<Id> separate_touching(const Contiguous<Id>& labels, int64_t ridge) {
  const auto in = labels_of<Id>(labels, std::nullopt, std::nullopt);
  auto out = like<Id>(labels);
  Id* const to = out.mutable_data();
  {
    py::gil_scoped_release release;
    border_weight_map::host_separate(in, ridge, to);
  }
  return out;
}

// class_weight: None for balanced. `exact`: squared distances are int32_t, else float.
template <typename Id>
py::tuple border_weights(const Contiguous<Id>& labels,
                         const std::optional<Contiguous<uint8_t>>& classes,
                         const std::optional<Contiguous<bool>>& foreground,
                         const std::optional<std::vector<float>>& class_weight, int num_classes,
                         int64_t ridge, std::optional<int64_t> ignore_label, double w0,
                         double sigma, bool everywhere, double halo, double halo_sigma,
                         const Spacing& spacing, bool exact) {
  const auto in = labels_of<Id>(labels, classes, ignore_label);
  auto target = like<uint8_t>(labels);
  auto weights = like<float>(labels);
  std::vector<unsigned long long> counts(labels.shape(0) * num_classes);
  border_weight_map::MapSettings settings{
      num_classes,
      ridge,
      {border_weight_map::Term::of(w0, sigma), border_weight_map::Term::of(halo, halo_sigma)},
      everywhere,
      {spacing[0], spacing[1], spacing[2]},
      {},
      nullptr,
      class_weight ? nullptr : counts.data()};
  if (class_weight)
    std::copy(class_weight->begin(), class_weight->end(), settings.class_weights.at);
  uint8_t* const to = target.mutable_data();
  float* const to_weights = weights.mutable_data();
  const bool* const cells = foreground ? foreground->data() : nullptr;
  {
    py::gil_scoped_release release;
    exact ? border_weight_map::host_map<int32_t>(in, cells, settings, to, to_weights)
          : border_weight_map::host_map<float>(in, cells, settings, to, to_weights);
  }
  return py::make_tuple(target, weights);
}

template <typename Id>
void bind_labels(py::module_& m) {
  m.def("two_nearest", &two_nearest<Id>, py::arg("labels").noconvert(), py::arg("spacing"),
        py::arg("exact"));
  m.def("separate_touching", &separate_touching<Id>, py::arg("labels").noconvert(),
        py::arg("ridge"));
  m.def("border_weights", &border_weights<Id>, py::arg("labels").noconvert(), py::arg("classes"),
        py::arg("foreground"), py::arg("class_weight"), py::arg("num_classes"), py::arg("ridge"),
        py::arg("ignore_label"), py::arg("w0"), py::arg("sigma"), py::arg("everywhere"),
        py::arg("halo"), py::arg("halo_sigma"), py::arg("spacing"), py::arg("exact"));
}

template <typename T>
elastic_deform::Strides strides_of(const Array<T>& x) {
  const auto stride = [&](int axis) {
    return static_cast<int64_t>(x.strides(axis)) / static_cast<int64_t>(sizeof(T));
  };
  if (x.ndim() == 3) return {stride(0), 0, stride(1), stride(2)};
  return {stride(0), stride(1), stride(2), stride(3)};
}

using Parameter = std::optional<py::array>;  // contiguous, float32 or float64
elastic_deform::Values values(const Parameter& x) {
  if (!x) return {nullptr, false};
  return {x->data(), x->strides(x->ndim() - 1) == sizeof(float)};
}
template <typename T>
using Curves = std::optional<Contiguous<unet_fast::Accumulator<T>>>;

using SourceImages = std::optional<Contiguous<int64_t>>;

// The settings of elastic_deform, as in its schema.
struct DeformSettings {
  std::vector<int64_t> orders;
  int32_t grid;
  bool spans_input;
  std::array<double, 2> scales;
  int32_t boundary;
  double cval;
};

// The movement and the image that the kernels take, made from the operator's arguments.
template <typename T>
struct Deformation {
  Deformation(const Array<T>& image, const Parameter& displacement, const Parameter& affine,
              const Parameter& offset, const Curves<T>& curves, const DeformSettings& settings,
              elastic_deform::Sides output, const SourceImages& source = std::nullopt)
      : movement(
            source ? source->shape(0) : image.shape(0), {image.shape(2), image.shape(3)}, output,
            displacement ? elastic_deform::Sides{displacement->shape(2), displacement->shape(3)}
                         : elastic_deform::Sides{1, 1},
            settings.grid, settings.spans_input, settings.scales[0], settings.scales[1],
            settings.boundary, values(displacement), values(affine), values(offset),
            source ? source->data() : nullptr, image.shape(0)),
        image(image.data(), strides_of(image), movement.movement, image.shape(1), settings.orders,
              curves_of(curves), settings.cval) {}

  static auto curves_of(const Curves<T>& curves) {
    using A = unet_fast::Accumulator<T>;
    const auto unit = static_cast<A>(elastic_deform::kUnit<T>);
    if (!curves) return elastic_deform::Curves<A>{nullptr, 0, 0, unit};
    return elastic_deform::Curves<A>{curves->data(), curves->shape(1), curves->shape(2), unit};
  }

  elastic_deform::HostMovement movement;
  elastic_deform::HostImage<T> image;
};

template <typename T>
py::tuple deform(const Array<T>& image, const Parameter& displacement, const Parameter& affine,
                 const Parameter& offset, const std::optional<py::array>& labels,
                 const Curves<T>& curves, const std::vector<int64_t>& orders, int32_t grid,
                 bool spans_input, const std::array<double, 2>& scales, int32_t boundary,
                 double cval, const std::array<int64_t, 2>& shape,
                 const std::array<int64_t, 2>& window, const SourceImages& source) {
  const py::ssize_t images = source ? source->shape(0) : image.shape(0);
  Contiguous<T> out({images, image.shape(1), shape[0], shape[1]});
  py::object moved = py::none();
  elastic_deform::LabelWindow taken{};
  if (labels) {
    py::array result(labels->dtype(), std::vector<py::ssize_t>{images, window[0], window[1]});
    const int64_t bytes = labels->itemsize();
    taken = {
        labels->data(),
        bytes,
        {labels->strides(0) / bytes, 0, labels->strides(1) / bytes, labels->strides(2) / bytes},
        {window[0], window[1]},
        result.mutable_data()};
    moved = result;
  }
  const elastic_deform::Strides to = strides_of(Array<T>(out));
  T* const data = out.mutable_data();
  {
    py::gil_scoped_release release;
    const Deformation<T> in(image, displacement, affine, offset, curves,
                            {orders, grid, spans_input, scales, boundary, cval},
                            {shape[0], shape[1]}, source);
    launch_deform(in.movement.movement, in.image.image, to, data, taken, cuda_on_host::Stream{});
  }
  return py::make_tuple(out, moved);
}

template <typename T>
py::tuple deform_backward(const Array<T>& grad, const Array<T>& image,
                          const Parameter& displacement, const Parameter& affine,
                          const Parameter& offset, const Curves<T>& curves,
                          const std::vector<int64_t>& orders, int32_t grid, bool spans_input,
                          const std::array<double, 2>& scales, int32_t boundary, double cval) {
  Contiguous<T> by_image = like<T>(image);
  Contiguous<double> by_displacement(
      displacement ? std::vector<py::ssize_t>(displacement->shape(), displacement->shape() + 4)
                   : std::vector<py::ssize_t>{0});
  const elastic_deform::Strides to = strides_of(Array<T>(by_image));
  T* const data = by_image.mutable_data();
  double* const moved = by_displacement.mutable_data();
  {
    py::gil_scoped_release release;
    const Deformation<T> in(image, displacement, affine, offset, curves,
                            {orders, grid, spans_input, scales, boundary, cval},
                            {grad.shape(2), grad.shape(3)});
    const elastic_deform::Source<T> upstream{grad.data(), strides_of(grad)};
    host_image_gradient(in.movement.movement, in.image.image, upstream, to, data);
    if (displacement) {
      host_displacement_gradient(in.movement.movement, in.image.image, upstream, moved);
    }
  }
  return py::make_tuple(by_image, by_displacement);
}

template <typename T>
void bind_deform(py::module_& m) {
  m.def("elastic_deform", &deform<T>, py::arg("image").noconvert(), py::arg("displacement"),
        py::arg("affine"), py::arg("offset"), py::arg("labels"), py::arg("gray_curve"),
        py::arg("orders"), py::arg("grid"), py::arg("spans_input"), py::arg("scales"),
        py::arg("boundary"), py::arg("cval"), py::arg("output_shape"), py::arg("label_shape"),
        py::arg("source") = py::none());
  m.def("elastic_deform_backward", &deform_backward<T>, py::arg("grad").noconvert(),
        py::arg("image").noconvert(), py::arg("displacement"), py::arg("affine"), py::arg("offset"),
        py::arg("gray_curve"), py::arg("orders"), py::arg("grid"), py::arg("spans_input"),
        py::arg("scales"), py::arg("boundary"), py::arg("cval"));
}

}  // namespace

PYBIND11_MODULE(_cuda_on_host, m) {
  bind<float, uint8_t>(m);
  bind<float, int16_t>(m);
  bind<float, int32_t>(m);
  bind<float, int64_t>(m);
  bind<double, int64_t>(m);
  bind_labels<int8_t>(m);
  bind_labels<uint8_t>(m);
  bind_labels<int16_t>(m);
  bind_labels<uint16_t>(m);
  bind_labels<int32_t>(m);
  bind_labels<int64_t>(m);
  bind_deform<float>(m);
  bind_deform<double>(m);
  bind_deform<uint8_t>(m);
}
