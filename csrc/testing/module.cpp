#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/elementary.h"
#include "testing/border_weight_map_case.h"
#include "testing/elastic_deform_case.h"
#include "testing/weighted_ce_case.h"

// Python module that runs the CUDA kernels on the host, with NumPy arrays, and the scalar functions
// of the CPU kernels' inner loops. Built by the tests, never installed.
namespace py = pybind11;
namespace border_weight_map = unet_fast::border_weight_map;
namespace elastic_deform = unet_fast::elastic_deform;
namespace weighted_ce = unet_fast::weighted_ce;

namespace {

template <typename T>
using Array = py::array_t<T, 0>;  // any strides
template <typename T>
using Contiguous = py::array_t<T, py::array::c_style>;

using cuda_on_host::DeviceMemory;

// Lets kernels use an array while this lives: one that holds values, or one for results.
class Shown {
 public:
  enum State { kValues, kResults };
  Shown(const py::array& x, State state) : visible_(x.data(), extent(x), state == kValues) {}
  template <typename T>
  Shown(const std::optional<T>& x, State state)
      : visible_(x ? x->data() : nullptr, x ? extent(*x) : 0, state == kValues) {}

 private:
  // From its first element to the end of its last; no stride is negative.
  static size_t extent(const py::array& x) {
    const py::gil_scoped_acquire held;  // may be called without
    if (x.size() == 0) return 0;
    py::ssize_t last = 0;
    for (py::ssize_t axis = 0; axis < x.ndim(); ++axis)
      last += (x.shape(axis) - 1) * x.strides(axis);
    return static_cast<size_t>(last + x.itemsize());
  }

  cuda_on_host::Visible visible_;
};

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
  DeviceMemory<double> divisor(1);
  T* const out = loss.mutable_data();
  const Shown values[]{
      {logits, Shown::kValues}, {target, Shown::kValues}, {weight, Shown::kValues}};
  const Shown results(loss, Shown::kResults);
  {
    py::gil_scoped_release release;
    weighted_ce::host_forward(in, out, divisor.data());
  }
  return py::make_tuple(loss, *divisor.data());
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
  const Shown values[]{{grad, Shown::kValues},
                       {logits, Shown::kValues},
                       {target, Shown::kValues},
                       {weight, Shown::kValues}};
  const Shown results(out, Shown::kResults);
  const cuda_on_host::Visible given(&divisor, sizeof(divisor), true);
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
  const Shown values(labels, Shown::kValues);
  const Shown results[]{{first, Shown::kResults}, {second, Shown::kResults}};
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
  const Shown values(labels, Shown::kValues), results(out, Shown::kResults);
  {
    py::gil_scoped_release release;
    border_weight_map::host_separate(in, ridge, to);
  }
  return out;
}

// class_weight: None for balanced. `numbers`: "int32" or "float" squared distances, or "packed";
// raises ValueError if the packed kernels do not take the map.
template <typename Id>
py::tuple border_weights(const Contiguous<Id>& labels,
                         const std::optional<Contiguous<uint8_t>>& classes,
                         const std::optional<Contiguous<bool>>& foreground,
                         const std::optional<std::vector<float>>& class_weight, int num_classes,
                         int64_t ridge, std::optional<int64_t> ignore_label, double w0,
                         double sigma, bool everywhere, double halo, double halo_sigma,
                         const Spacing& spacing, const std::string& numbers) {
  const auto in = labels_of<Id>(labels, classes, ignore_label);
  auto target = like<uint8_t>(labels);
  auto weights = like<float>(labels);
  border_weight_map::MapSettings settings{
      num_classes,
      ridge,
      {border_weight_map::Term::of(w0, sigma), border_weight_map::Term::of(halo, halo_sigma)},
      everywhere,
      {spacing[0], spacing[1], spacing[2]},
      {},
      nullptr,
      !class_weight};
  if (class_weight)
    std::copy(class_weight->begin(), class_weight->end(), settings.class_weights.at);
  uint8_t* const to = target.mutable_data();
  float* const to_weights = weights.mutable_data();
  const bool* const cells = foreground ? foreground->data() : nullptr;
  if (numbers == "packed" && !border_weight_map::packs(in, settings)) {
    throw py::value_error("the packed kernels do not take this map");
  }
  const Shown values[]{
      {labels, Shown::kValues}, {classes, Shown::kValues}, {foreground, Shown::kValues}};
  const Shown results[]{{target, Shown::kResults}, {weights, Shown::kResults}};
  {
    py::gil_scoped_release release;
    if (numbers == "packed") {
      border_weight_map::host_packed_map(in, cells, settings, to, to_weights);
    } else if (numbers == "int32") {
      border_weight_map::host_map<int32_t>(in, cells, settings, to, to_weights);
    } else {
      border_weight_map::host_map<float>(in, cells, settings, to, to_weights);
    }
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
        py::arg("halo"), py::arg("halo_sigma"), py::arg("spacing"), py::arg("numbers"));
}

// Strides of an image or of labels, in elements of so many bytes. May be called without the GIL.
template <int axes>
elastic_deform::Strides<axes> strides_of(const py::array& x, int64_t bytes) {
  const int first = static_cast<int>(x.ndim()) - axes;  // 1 for labels, which have no channels
  elastic_deform::Strides<axes> result{
      x.strides(0) / bytes, first == 1 ? 0 : x.strides(1) / bytes, {}};
  for (int axis = 0; axis < axes; ++axis) {
    result.along[axis] = x.shape(first + axis) > 1 ? x.strides(first + axis) / bytes : 0;
  }
  return result;
}

template <int axes>
elastic_deform::Sides<axes> sides_of(const py::array& x) {
  elastic_deform::Sides<axes> result;
  for (int axis = 0; axis < axes; ++axis) result[axis] = x.shape(x.ndim() - axes + axis);
  return result;
}
template <int axes>
elastic_deform::Sides<axes> sides_of(const std::vector<int64_t>& shape) {
  elastic_deform::Sides<axes> result;
  std::copy_n(shape.begin(), axes, result.along);
  return result;
}

// A new array (N, ..., sides).
template <typename T, int axes>
T new_array(py::dtype dtype, std::vector<py::ssize_t> shape,
            const elastic_deform::Sides<axes>& sides) {
  shape.insert(shape.end(), sides.along, sides.along + axes);
  return T(py::array(dtype, shape));
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
  std::vector<double> scales;
  int32_t boundary;
  double cval;
};

// The movement and the image that the kernels take, made from the operator's arguments.
template <typename T, int axes>
struct Deformation {
  using Sides = elastic_deform::Sides<axes>;

  Deformation(const Array<T>& image, const Parameter& displacement, const Parameter& affine,
              const Parameter& offset, const Curves<T>& curves, const DeformSettings& settings,
              const Sides& output, const SourceImages& source = std::nullopt)
      : shown{{image, Shown::kValues},  {displacement, Shown::kValues}, {affine, Shown::kValues},
              {offset, Shown::kValues}, {curves, Shown::kValues},       {source, Shown::kValues}},
        movement(source ? source->shape(0) : image.shape(0), sides_of<axes>(image), output,
                 displacement ? sides_of<axes>(*displacement) : Sides{}, settings.grid,
                 settings.spans_input, settings.scales.data(), settings.boundary,
                 values(displacement), values(affine), values(offset),
                 source ? source->data() : nullptr, image.shape(0)),
        image(image.data(), strides_of<axes>(image, sizeof(T)), movement.movement, image.shape(1),
              settings.orders, curves_of(curves), settings.cval) {}

  static auto curves_of(const Curves<T>& curves) {
    using A = unet_fast::Accumulator<T>;
    const auto unit = static_cast<A>(elastic_deform::kUnit<T>);
    if (!curves) return elastic_deform::Curves<A>{};
    return elastic_deform::Curves<A>::of(curves->data(), curves->shape(1), curves->shape(2), unit);
  }

  Shown shown[6];
  elastic_deform::HostMovement<axes> movement;
  elastic_deform::HostImage<T, axes> image;
};

template <typename T, int axes>
py::tuple deform(const Array<T>& image, const Parameter& displacement, const Parameter& affine,
                 const Parameter& offset, const std::optional<py::array>& labels,
                 const Curves<T>& curves, const std::vector<int64_t>& orders, int32_t grid,
                 bool spans_input, const std::vector<double>& scales, int32_t boundary, double cval,
                 const std::vector<int64_t>& shape, const std::vector<int64_t>& window,
                 const SourceImages& source) {
  const py::ssize_t images = source ? source->shape(0) : image.shape(0);
  const auto output = sides_of<axes>(shape), inner = sides_of<axes>(window);
  auto out = new_array<Contiguous<T>>(py::dtype::of<T>(), {images, image.shape(1)}, output);
  py::object moved = py::none();
  elastic_deform::LabelWindow<axes> taken{};
  Parameter result;
  if (labels) {
    result = new_array<py::array>(labels->dtype(), {images}, inner);
    taken = {labels->data(), labels->itemsize(), strides_of<axes>(*labels, labels->itemsize()),
             inner, result->mutable_data()};
    moved = *result;
  }
  const auto to = strides_of<axes>(out, sizeof(T));
  T* const data = out.mutable_data();
  const Shown values(labels, Shown::kValues);
  const Shown results[]{{out, Shown::kResults}, {result, Shown::kResults}};
  {
    py::gil_scoped_release release;
    const Deformation<T, axes> in(image, displacement, affine, offset, curves,
                                  {orders, grid, spans_input, scales, boundary, cval}, output,
                                  source);
    launch_deform(in.movement.movement, in.image.image, to, data, taken, cuda_on_host::Stream{});
  }
  return py::make_tuple(out, moved);
}

// The order of the lean kernels that would work on a call, or -1.
template <typename T, int axes>
int lean_order(const Array<T>& image, const Parameter& displacement,
               const std::vector<int64_t>& orders, const std::vector<double>& scales,
               const std::vector<int64_t>& shape) {
  const auto output = sides_of<axes>(shape);
  const Shown values[]{{image, Shown::kValues}, {displacement, Shown::kValues}};
  const Deformation<T, axes> in(image, displacement, {}, {}, {}, {orders, 0, false, scales, 0, 0.0},
                                output);
  elastic_deform::Strides<axes> to{0, output.pixels(), {}};
  for (int axis = 0; axis < axes; ++axis) to.along[axis] = output.step(axis);
  return elastic_deform::lean_order(in.movement.movement, in.image.image, to);
}

template <typename T, int axes>
py::tuple deform_backward(const Array<T>& grad, const Array<T>& image,
                          const Parameter& displacement, const Parameter& affine,
                          const Parameter& offset, const Curves<T>& curves,
                          const std::vector<int64_t>& orders, int32_t grid, bool spans_input,
                          const std::vector<double>& scales, int32_t boundary, double cval) {
  Contiguous<T> by_image = like<T>(image);
  Contiguous<double> by_displacement =
      displacement ? like<double>(*displacement) : Contiguous<double>(0);
  const auto to = strides_of<axes>(by_image, sizeof(T));
  T* const data = by_image.mutable_data();
  double* const moved = by_displacement.mutable_data();
  const Shown values(grad, Shown::kValues);
  const Shown results[]{{by_image, Shown::kResults}, {by_displacement, Shown::kResults}};
  {
    py::gil_scoped_release release;
    const Deformation<T, axes> in(image, displacement, affine, offset, curves,
                                  {orders, grid, spans_input, scales, boundary, cval},
                                  sides_of<axes>(grad));
    const elastic_deform::Source<T, axes> upstream{grad.data(), strides_of<axes>(grad, sizeof(T))};
    host_image_gradient(in.movement.movement, in.image.image, upstream, to, data);
    if (displacement) {
      host_displacement_gradient(in.movement.movement, in.image.image, upstream, moved);
    }
  }
  return py::make_tuple(by_image, by_displacement);
}

template <typename T, int axes>
void bind_deform(py::module_& m, const std::string& suffix) {
  m.def(("elastic_deform" + suffix).c_str(), &deform<T, axes>, py::arg("image").noconvert(),
        py::arg("displacement"), py::arg("affine"), py::arg("offset"), py::arg("labels"),
        py::arg("gray_curve"), py::arg("orders"), py::arg("grid"), py::arg("spans_input"),
        py::arg("scales"), py::arg("boundary"), py::arg("cval"), py::arg("output_shape"),
        py::arg("label_shape"), py::arg("source") = py::none());
  m.def(("elastic_deform_lean_order" + suffix).c_str(), &lean_order<T, axes>,
        py::arg("image").noconvert(), py::arg("displacement"), py::arg("orders"), py::arg("scales"),
        py::arg("output_shape"));
  m.def(("elastic_deform_backward" + suffix).c_str(), &deform_backward<T, axes>,
        py::arg("grad").noconvert(), py::arg("image").noconvert(), py::arg("displacement"),
        py::arg("affine"), py::arg("offset"), py::arg("gray_curve"), py::arg("orders"),
        py::arg("grid"), py::arg("spans_input"), py::arg("scales"), py::arg("boundary"),
        py::arg("cval"));
}

}  // namespace

PYBIND11_MODULE(_cuda_on_host, m) {
  // None: kernels run here.
  m.def("use_interpreter", [](py::object add, py::object remove, py::object launch) {
    using cuda_on_host::Interpreter;
    cuda_on_host::interpreter = {add.cast<decltype(Interpreter::add)>(),
                                 remove.cast<decltype(Interpreter::remove)>(),
                                 launch.cast<decltype(Interpreter::launch)>()};
  });
  m.def("exp_nonpositive", py::vectorize(&unet_fast::exp_nonpositive_host));
  m.def("log1p_nonnegative",
        py::vectorize([](float x) { return unet_fast::log1p_nonnegative(x); }));
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
  bind_deform<float, 2>(m, "");
  bind_deform<double, 2>(m, "");
  bind_deform<uint8_t, 2>(m, "");
  bind_deform<float, 3>(m, "_3d");
  bind_deform<double, 3>(m, "_3d");
  bind_deform<uint8_t, 3>(m, "_3d");
}
