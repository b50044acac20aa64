#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "testing/border_weight_map_case.h"
#include "testing/elastic_deform_case.h"
#include "testing/weighted_ce_case.h"

// Runs the launchers on sizes that straddle their tiles. The tests build it with -fsanitize, so
// that the sanitizer finds races and bad reads; results are checked against plain loops. Exits with
// 1 if a result is wrong.
namespace border_weight_map = unet_fast::border_weight_map;
namespace elastic_deform = unet_fast::elastic_deform;
namespace weighted_ce = unet_fast::weighted_ce;

namespace {

// A type of two bytes, of which the kernels load eight at once.
struct BFloat16 {
  BFloat16() = default;
  explicit BFloat16(float x) : bits((std::bit_cast<uint32_t>(x) + 0x8000u) >> 16) {}
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
  uint16_t bits;
};

// One launch over two images; returns whether loss and gradient sums are right.
template <typename T>
bool check_weighted_ce(int64_t pixels, int64_t classes, bool channels_last) {
  constexpr int64_t kImages = 2;
  std::mt19937 random(static_cast<unsigned>(pixels * 31 + classes));
  std::normal_distribution<float> normal;
  std::vector<T> logits(kImages * classes * pixels);
  for (T& x : logits) x = T(normal(random));
  std::vector<uint8_t> target(kImages * pixels);
  for (uint8_t& t : target) t = static_cast<uint8_t>(random() % classes);
  target[0] = 255;  // ignored
  std::vector<float> weight(kImages * pixels);
  for (float& w : weight) w = std::abs(normal(random));

  const unet_fast::Layout layout{kImages,
                                 classes,
                                 pixels,
                                 classes * pixels,
                                 channels_last ? 1 : pixels,
                                 channels_last ? classes : 1};
  const weighted_ce::Problem<T, float> in{layout,
                                          logits.data(),
                                          target.data(),
                                          unet_fast::IntegerType::kUint8,
                                          weight.data(),
                                          255,
                                          weighted_ce::kWeightedMean};
  float loss = 0;
  double divisor = 0;
  weighted_ce::host_forward(in, &loss, &divisor);
  const float grad = 1;
  std::vector<T> out(logits.size(), T(NAN));
  weighted_ce::host_backward(in, &grad, &divisor, out.data());

  // The expected values, by the formulas in double.
  const double rounding = sizeof(T) == 2 ? 0x1p-8 : 0;
  double sum = 0, weights = 0, worst = 0;
  const auto at = [&](const T* x, int64_t c) {
    return static_cast<double>(static_cast<float>(x[c * layout.class_stride]));
  };
  for (int64_t i = 0; i < kImages * pixels; ++i) {
    if (target[i] != 255) weights += weight[i];
  }
  for (int64_t i = 0; i < kImages * pixels; ++i) {
    const T* const x = logits.data() + layout.offset(i / pixels, i % pixels);
    const T* const y = out.data() + layout.offset(i / pixels, i % pixels);
    const double w = target[i] == 255 ? 0 : weight[i];
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) total += std::exp(at(x, c));
    for (int64_t c = 0; c < classes; ++c) {
      const double p = std::exp(at(x, c)) / total;
      const double expected = w / weights * (p - (c == target[i]));
      worst = std::max(worst, std::abs(at(y, c) - expected) - rounding * std::abs(expected));
    }
    if (w > 0) sum += w * (std::log(total) - at(x, target[i]));
  }
  const bool right = std::abs(loss - sum / weights) < 1e-5 && worst < 1e-6;
  if (!right) std::printf("weighted_ce: %g, expected %g, worst %g\n", loss, sum / weights, worst);
  return right;
}

// Two images (or volumes) of sparse pixels of three objects, whose labels differ in high bits only
// in the second one; returns whether the weights are right.
template <typename D>  // of squared distances; uint32_t: packed
bool check_border_weights(int64_t depth, int64_t height, int64_t width, bool balanced) {
  std::mt19937 random(static_cast<unsigned>(height * 31 + width));
  const int64_t volume = depth * height * width;
  std::vector<int32_t> objects(2 * volume), ids(objects.size());
  for (int64_t i = 0; i < 2 * volume; ++i) {
    objects[i] = random() % 8 == 0 ? static_cast<int32_t>(1 + random() % 3) : 0;
    ids[i] = i < volume || objects[i] == 0 ? objects[i] : objects[i] << 20;
  }
  const border_weight_map::Labels labels{
      2, depth, height, width, ids.data(), unet_fast::IntegerType::kInt32, nullptr, false, 0};
  constexpr double kW0 = 10, kSigma = 2, kHalo = 0.9, kHaloSigma = 3;
  const border_weight_map::MapSettings settings{
      2,
      border_weight_map::kTwoSided,
      {border_weight_map::Term::of(kW0, kSigma), border_weight_map::Term::of(kHalo, kHaloSigma)},
      false,
      {1, 1, 1},
      {{0.5f, 2.0f}},
      nullptr,
      balanced};
  std::vector<uint8_t> target(ids.size());
  std::vector<float> weights(ids.size(), NAN);
  if constexpr (std::is_same_v<D, uint32_t>) {
    border_weight_map::host_packed_map(labels, nullptr, settings, target.data(), weights.data());
  } else {
    border_weight_map::host_map<D>(labels, nullptr, settings, target.data(), weights.data());
  }

  // The expected values, from all pairs of pixels.
  const auto at = [&](int64_t i, int axis) {
    const int64_t p = i % volume;
    return axis == 0 ? p / (height * width) : axis == 1 ? p / width % height : p % width;
  };
  double worst = 0;
  for (int64_t image = 0; image < 2; ++image) {
    std::vector<bool> cell(volume);
    std::vector<double> first(volume), second(volume), cells{0, 0};
    for (int64_t p = 0; p < volume; ++p) {
      double nearest[4] = {INFINITY, INFINITY, INFINITY, INFINITY};
      bool ridge = false;
      const int32_t here = objects[image * volume + p];
      for (int64_t q = 0; q < volume; ++q) {
        const int32_t id = objects[image * volume + q];
        double square = 0;
        for (int axis = 0; axis < 3; ++axis) square += std::pow(at(p, axis) - at(q, axis), 2);
        if (id != 0) nearest[id] = std::min(nearest[id], std::sqrt(square));
        ridge |= square == 1 && id != 0 && here != 0 && id != here;
      }
      std::sort(nearest, nearest + 4);
      first[p] = nearest[0];
      second[p] = nearest[1];
      cell[p] = here != 0 && !ridge;
      cells[cell[p]] += 1;
    }
    for (int64_t p = 0; p < volume; ++p) {
      const double present = (cells[0] > 0) + (cells[1] > 0);
      double expected = balanced ? static_cast<double>(volume) / (present * cells[cell[p]])
                                 : (cell[p] ? 2.0 : 0.5);
      const auto term = [](double height, double sigma, double d) {
        return height * std::exp(-d * d / (2 * sigma * sigma));
      };
      if (!cell[p]) {
        expected += term(kW0, kSigma, first[p] + second[p]) + term(kHalo, kHaloSigma, first[p]);
      }
      const int64_t i = image * volume + p;
      worst = std::max(worst, std::abs(weights[i] - expected) / expected);
      worst = target[i] == cell[p] ? worst : INFINITY;
    }
  }
  if (!(worst < 1e-5)) std::printf("border_weights: relative error %g\n", worst);
  return worst < 1e-5;
}

// Two ramps moved by a constant field, mirrored at the border; returns whether values, labels and
// derivatives are right.
template <int axes>
bool check_elastic_deform(const elastic_deform::Sides<axes>& input,
                          const elastic_deform::Sides<axes>& output, int order) {
  using Sides = elastic_deform::Sides<axes>;
  constexpr int64_t kImages = 2;
  constexpr int64_t kSource[kImages] = {1, 0};
  constexpr int64_t kShift[3] = {2, -1, 1};
  constexpr double kSlope[3] = {3, 1, 2};
  const auto ramp_at = [&](const Sides& place) {
    double result = 0;
    for (int axis = 0; axis < axes; ++axis) result += kSlope[axis] * place[axis];
    return result;
  };
  const auto strides_of = [](const Sides& sides) {
    elastic_deform::Strides<axes> result{sides.pixels(), sides.pixels(), {}};
    for (int axis = 0; axis < axes; ++axis) {
      result.along[axis] = sides[axis] > 1 ? sides.step(axis) : 0;
    }
    return result;
  };
  std::vector<float> ramp(kImages * input.pixels());
  std::vector<int16_t> ids(ramp.size());
  for (size_t i = 0; i < ramp.size(); ++i) {
    const int64_t p = static_cast<int64_t>(i) % input.pixels();
    ramp[i] = static_cast<float>(ramp_at(input.place_of(p)));
    ids[i] = static_cast<int16_t>(p);
  }
  Sides points;
  double scales[axes];
  for (int axis = 0; axis < axes; ++axis) {
    points[axis] = 3;
    scales[axis] = output[axis] > 1 ? 2.0 / static_cast<double>(output[axis] - 1) : 0.0;
  }
  std::vector<double> displacement(kImages * axes * points.pixels());
  const auto component = [&](size_t i) { return i / points.pixels() % axes; };
  for (size_t i = 0; i < displacement.size(); ++i) displacement[i] = kShift[component(i)];
  const elastic_deform::HostMovement<axes> movement(
      kImages, input, output, points, elastic_deform::kInterpolating, false, scales,
      elastic_deform::kMirror, {displacement.data(), false}, {}, {}, kSource, kImages);
  const elastic_deform::Movement<axes>& m = movement.movement;
  const auto strides = strides_of(input), to = strides_of(output);
  const elastic_deform::HostImage<float, axes> image(ramp.data(), strides, m, 1, {order}, {}, 0);
  std::vector<float> out(kImages * output.pixels(), NAN), back(ramp.size(), NAN);
  std::vector<int16_t> moved(out.size());
  launch_deform(m, image.image, to, out.data(),
                {ids.data(), sizeof(int16_t), strides, output, moved.data()},
                cuda_on_host::Stream{});
  const std::vector<float> ones(out.size(), 1.0f);
  host_image_gradient(m, image.image, {ones.data(), to}, strides, back.data());
  std::vector<double> by_displacement(displacement.size(), NAN);
  host_displacement_gradient(m, image.image, {ones.data(), to}, by_displacement.data());

  const auto mirrored = [](int64_t i, int64_t n) {
    if (n == 1) return int64_t{0};
    i = ((i % (2 * n - 2)) + 2 * n - 2) % (2 * n - 2);
    return i < n ? i : 2 * n - 2 - i;
  };
  double worst = 0, slopes = 0;
  for (int64_t i = 0; i < kImages * output.pixels(); ++i) {
    Sides place = output.place_of(i % output.pixels());
    // By rounding, a site may lie in the interval before its pixel instead of the one behind it;
    // inside the image both have the same slope.
    const int64_t first = place[0] + kShift[0];
    if (first > 0 && first < input[0] - 1) slopes += kSlope[0];
    for (int axis = 0; axis < axes; ++axis) {
      place[axis] = mirrored(place[axis] + kShift[axis], input[axis]);
    }
    worst = std::max(worst, std::abs(out[i] - ramp_at(place)));
    worst = moved[i] == input.index_of(place) ? worst : INFINITY;
  }
  double sum = 0, gradient = 0;
  for (const float g : back) sum += g;
  for (size_t i = 0; i < by_displacement.size(); ++i) {
    if (component(i) == 0) gradient += by_displacement[i];
  }
  const double total = static_cast<double>(out.size());
  worst = std::max(worst, std::abs(sum / total - 1));
  // At the border the slope may have either sign.
  const double border = kSlope[0] * kImages * static_cast<double>(output.step(0)) * 6;
  if (order == 1 && input[0] > 1) {
    worst = std::abs(gradient - slopes) <= border ? worst : INFINITY;
  }
  if (!(worst < 1e-3)) std::printf("elastic_deform: error %g\n", worst);
  return worst < 1e-3;
}

}  // namespace

int main() {
  bool right = true;
  right &= check_border_weights<int32_t>(1, 1, 1, true);
  right &= check_border_weights<int32_t>(1, 2 * 16 + 1, 5, true);
  right &= check_border_weights<float>(1, 5, unet_fast::kThreads / 5 + 2, false);
  right &= check_border_weights<int32_t>(3, 6, 7, false);
  right &= check_border_weights<uint32_t>(1, 1, 1, true);
  right &= check_border_weights<uint32_t>(1, border_weight_map::kRows + 1, 5, true);
  right &= check_border_weights<uint32_t>(1, 2, border_weight_map::kRun + 3, false);
  constexpr int64_t kHigh = elastic_deform::kHigh, kWide = elastic_deform::kWide;
  right &= check_elastic_deform<2>({1, 1}, {1, 1}, 0);
  right &= check_elastic_deform<2>({kHigh + 2, 7}, {kHigh + 1, 3}, 1);
  right &= check_elastic_deform<2>({5, kWide + 3}, {3, kWide + 1}, 3);
  right &= check_elastic_deform<3>({1, 1, 1}, {1, 1, 1}, 0);
  right &= check_elastic_deform<3>({3, kHigh + 2, 7}, {2, kHigh + 1, 3}, 1);
  right &= check_elastic_deform<3>({4, 5, kWide + 3}, {2, 3, kWide + 1}, 3);
  // Cells so large that the lean kernels work.
  constexpr int64_t kLeast = kHigh / 2 + 1;
  right &= check_elastic_deform<2>({7, kWide + 2}, {kLeast, kWide + 1}, 0);
  right &= check_elastic_deform<2>({kHigh + 2, 7}, {kHigh + 1, kLeast}, 1);
  right &= check_elastic_deform<3>({3, 7, kWide}, {2, kLeast, kLeast}, 1);
  constexpr int64_t kBlock = weighted_ce::kBlockPixels;
  for (int64_t pixels :
       {int64_t{1}, int64_t{257}, kBlock + 1, kBlock + weighted_ce::kPack<float>}) {
    right &= check_weighted_ce<float>(pixels, 2, false);
    right &= check_weighted_ce<float>(pixels, 3, true);
    right &= check_weighted_ce<float>(pixels, 5, true);
    right &= check_weighted_ce<BFloat16>(pixels, 5, false);
  }
  for (int64_t pixels : {int64_t{8}, kBlock + weighted_ce::kPack<BFloat16>}) {
    right &= check_weighted_ce<BFloat16>(pixels, 2, false);
    right &= check_weighted_ce<BFloat16>(pixels, 4, true);
  }
  for (bool channels_last : {false, true}) right &= check_weighted_ce<float>(75, 36, channels_last);
  right &= check_weighted_ce<float>(75, 20, true);
  right &= check_weighted_ce<BFloat16>(75, 40, true);
  right &= check_weighted_ce<BFloat16>(75, 72, true);
  return right ? 0 : 1;
}
