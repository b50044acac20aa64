#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "testing/weighted_ce_case.h"

// Runs the launchers on sizes that straddle their tiles. Built with -fsanitize by the tests: the
// sanitizer finds races and bad reads; the sums are checked against a plain loop. Exit code 1 if
// off.
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
                                              weighted_ce::IdType::kUint8,
                                              weight.data(),
                                              255,
                                              weighted_ce::kWeightedMean};
  float loss = 0;
  double divisor = 0;
  weighted_ce::host_forward(in, &loss, &divisor);
  const float grad = 1;
  std::vector<float> out(logits.size(), NAN);
  weighted_ce::host_backward(in, &grad, &divisor, out.data());

  // The same by the formulas, in double.
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

}  // namespace

int main() {
  bool right = true;
  constexpr int64_t kBlock = weighted_ce::kBlockPixels;
  for (int64_t pixels : {int64_t{1}, int64_t{257}, kBlock + 1, kBlock + weighted_ce::kPack}) {
    right &= check_weighted_ce(pixels, 2, false);
    right &= check_weighted_ce(pixels, 5, true);
  }
  return right ? 0 : 1;
}
