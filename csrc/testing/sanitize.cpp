#include <algorithm>
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

// One launch over two images; returns whether loss and gradient sums are right.
bool check_weighted_ce(int64_t pixels, int64_t classes, bool channels_last) {
  constexpr int64_t kImages = 2;
  std::mt19937 random(static_cast<unsigned>(pixels * 31 + classes));
  std::normal_distribution<float> normal;
  std::vector<float> logits(kImages * classes * pixels);
  for (float& x : logits) x = normal(random);
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
  const weighted_ce::Problem<float, float> in{layout,
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
  std::vector<float> out(logits.size(), NAN);
  weighted_ce::host_backward(in, &grad, &divisor, out.data());

  // The expected values, by the formulas in double.
  double sum = 0, weights = 0, worst = 0;
  for (int64_t i = 0; i < kImages * pixels; ++i) {
    if (target[i] != 255) weights += weight[i];
  }
  for (int64_t i = 0; i < kImages * pixels; ++i) {
    const float* const x = logits.data() + layout.offset(i / pixels, i % pixels);
    const float* const y = out.data() + layout.offset(i / pixels, i % pixels);
    const double w = target[i] == 255 ? 0 : weight[i];
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) total += std::exp(double{x[c * layout.class_stride]});
    for (int64_t c = 0; c < classes; ++c) {
      const double p = std::exp(double{x[c * layout.class_stride]}) / total;
      const double expected = w / weights * (p - (c == target[i]));
      worst = std::max(worst, std::abs(y[c * layout.class_stride] - expected));
    }
    if (w > 0) sum += w * (std::log(total) - x[target[i] * layout.class_stride]);
  }
  const bool right = std::abs(loss - sum / weights) < 1e-5 && worst < 1e-6;
  if (!right) std::printf("weighted_ce: %g, expected %g, worst %g\n", loss, sum / weights, worst);
  return right;
}

// Two images (or volumes) of sparse pixels of three objects; returns whether the weights are right.
template <typename D>
bool check_border_weights(int64_t depth, int64_t height, int64_t width, bool balanced) {
  std::mt19937 random(static_cast<unsigned>(height * 31 + width));
  const int64_t volume = depth * height * width;
  std::vector<int16_t> ids(2 * volume);
  for (int16_t& id : ids) id = random() % 8 == 0 ? static_cast<int16_t>(1 + random() % 3) : 0;
  const border_weight_map::Labels labels{
      2, depth, height, width, ids.data(), unet_fast::IntegerType::kInt16, nullptr, false, 0};
  constexpr double kW0 = 10, kSigma = 2, kHalo = 0.9, kHaloSigma = 3;
  std::vector<unsigned long long> counts(4);
  const border_weight_map::MapSettings settings{
      2,
      border_weight_map::kTwoSided,
      {border_weight_map::Term::of(kW0, kSigma), border_weight_map::Term::of(kHalo, kHaloSigma)},
      false,
      {1, 1, 1},
      {{0.5f, 2.0f}},
      nullptr,
      balanced ? counts.data() : nullptr};
  std::vector<uint8_t> target(ids.size());
  std::vector<float> weights(ids.size(), NAN);
  border_weight_map::host_map<D>(labels, nullptr, settings, target.data(), weights.data());

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
      const int16_t here = ids[image * volume + p];
      for (int64_t q = 0; q < volume; ++q) {
        const int16_t id = ids[image * volume + q];
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
bool check_elastic_deform(elastic_deform::Sides input, elastic_deform::Sides output, int order) {
  constexpr int64_t kImages = 2;
  constexpr int64_t kSource[kImages] = {1, 0};
  constexpr double kDown = 2, kRight = -1, kSlope = 3;
  std::vector<float> ramp(kImages * input.pixels());
  std::vector<int16_t> ids(ramp.size());
  for (size_t i = 0; i < ramp.size(); ++i) {
    const int64_t p = static_cast<int64_t>(i) % input.pixels();
    ramp[i] = static_cast<float>(kSlope * (p / input.columns) + p % input.columns);
    ids[i] = static_cast<int16_t>(p);
  }
  std::vector<double> displacement(kImages * 2 * 9, kDown);
  for (size_t i = 0; i < displacement.size(); ++i) {
    if (i / 9 % 2 == 1) displacement[i] = kRight;
  }
  const auto scale = [](int64_t n) { return n > 1 ? 2.0 / (n - 1) : 0.0; };
  const elastic_deform::HostMovement movement(
      kImages, input, output, {3, 3}, elastic_deform::kInterpolating, false, scale(output.rows),
      scale(output.columns), elastic_deform::kMirror, {displacement.data(), false}, {}, {}, kSource,
      kImages);
  const elastic_deform::Movement& m = movement.movement;
  const elastic_deform::Strides strides{input.pixels(), input.pixels(), input.columns, 1};
  const elastic_deform::HostImage<float> image(ramp.data(), strides, m, 1, {order}, {}, 0);
  std::vector<float> out(kImages * output.pixels(), NAN), back(ramp.size(), NAN);
  std::vector<int16_t> moved(out.size());
  const elastic_deform::Strides to{output.pixels(), output.pixels(), output.columns, 1};
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
    const int64_t p = i % output.pixels();
    const int64_t row = p / output.columns + static_cast<int64_t>(kDown);
    const int64_t column = p % output.columns + static_cast<int64_t>(kRight);
    const int64_t r = mirrored(row, input.rows), c = mirrored(column, input.columns);
    worst = std::max(worst, std::abs(out[i] - (kSlope * r + c)));
    worst = moved[i] == r * input.columns + c ? worst : INFINITY;
    // By rounding, a site may lie in the interval before its pixel instead of the one behind it;
    // inside the image both have the same slope.
    if (row > 0 && row < input.rows - 1) slopes += kSlope;
  }
  double sum = 0, gradient = 0;
  for (const float g : back) sum += g;
  for (size_t i = 0; i < by_displacement.size(); ++i) {
    if (i / 9 % 2 == 0) gradient += by_displacement[i];
  }
  const double total = static_cast<double>(out.size());
  worst = std::max(worst, std::abs(sum / total - 1));
  // At the border the slope may have either sign.
  const double border = kSlope * kImages * static_cast<double>(output.columns) * 6;
  if (order == 1 && input.rows > 1) {
    worst = std::abs(gradient - slopes) <= border ? worst : INFINITY;
  }
  if (!(worst < 1e-3)) std::printf("elastic_deform: error %g\n", worst);
  return worst < 1e-3;
}

}  // namespace

int main() {
  bool right = true;
  right &= check_border_weights<int32_t>(1, 1, 1, true);
  right &= check_border_weights<int32_t>(1, border_weight_map::kSegment + 1, 5, true);
  right &= check_border_weights<float>(1, 5, unet_fast::kThreads / 5 + 2, false);
  right &= check_border_weights<int32_t>(3, 6, 7, false);
  constexpr int64_t kTile = elastic_deform::kTile;
  right &= check_elastic_deform({1, 1}, {1, 1}, 0);
  right &= check_elastic_deform({kTile + 2, 7}, {kTile + 1, 3}, 1);
  right &= check_elastic_deform({5, kTile + 3}, {3, kTile + 1}, 3);
  constexpr int64_t kBlock = weighted_ce::kBlockPixels;
  for (int64_t pixels : {int64_t{1}, int64_t{257}, kBlock + 1, kBlock + weighted_ce::kPack}) {
    right &= check_weighted_ce(pixels, 2, false);
    right &= check_weighted_ce(pixels, 5, true);
  }
  return right ? 0 : 1;
}
