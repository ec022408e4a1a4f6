// `correlation`: the distance of features normalised per channel over the batch. The formulas are those of kdkernels/triton/correlation.py.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "compared.h"
#include "parallel.h"

namespace kd {
namespace {

// What is known of a channel: five numbers for the gradient, and a_s, a_t and both means for the rows.
constexpr int PLANES = 9;

// One channel of a level: fills its planes and adds to the images' sums of (z_s - z_t)^2.
void of_channel(const ComparedParts& parts, const Level& level, size_t index, int64_t c, double eps, float* plane, int64_t apart,
                std::vector<double>& errors) {
  constexpr int COUNT = numbers_of(Comparison::correlation);
  const int64_t images = level.images, bands = parts.bands(index), channels = level.channels;
  const double values = static_cast<double>(images) * level.pixels, others = std::max(values - 1, 1.0);
  double mean_s = 0, mean_t = 0, of_s = 0, of_both = 0, rest = 0;
  // Calls run(image, pixels, numbers) for each band of the channel.
  const auto each = [&](const auto& run) {
    for (int64_t image = 0; image < images; ++image) {
      const float* part = parts.part(index, image) + c;
      for (int64_t band = 0; band < bands; ++band, part += COUNT * channels) {
        double numbers[COUNT];
        for (int k = 0; k < COUNT; ++k) numbers[k] = part[k * channels];
        run(image, static_cast<double>(parts.pixels(index, band)), numbers);
      }
    }
  };
  each([&](int64_t, double pixels, const double* numbers) {
    mean_s += pixels * numbers[0] / values;
    mean_t += pixels * numbers[1] / values;
  });
  each([&](int64_t, double pixels, const double* numbers) {
    const double s = numbers[0] - mean_s, t = numbers[1] - mean_t;
    of_s += numbers[2] + pixels * s * s;
    of_both += numbers[3] * numbers[2] + pixels * s * t;
  });
  const double slope = of_s > 0 ? of_both / of_s : 0;
  each([&](int64_t, double pixels, const double* numbers) {
    const double tilted = numbers[3] - slope, away = numbers[1] - mean_t - slope * (numbers[0] - mean_s);
    rest += numbers[4] + tilted * numbers[2] * tilted + pixels * away * away;
  });
  const double sigma_s = std::sqrt(of_s / others), sigma_t = std::sqrt((rest + slope * of_both) / others);
  const double a_s = 1 / (sigma_s + eps), a_t = 1 / (sigma_t + eps);
  const double v = -a_s * a_t / (values * channels), u = a_s * a_s * eps * (a_s - a_t * slope) / (values * channels) - v * slope;
  const std::vector<float>& origins = parts.origins(index);
  const double known[PLANES] = {origins[c], u, origins[channels + c], v, -u * mean_s - v * mean_t, a_s, a_t, mean_s, mean_t};
  for (int k = 0; k < PLANES; ++k) plane[k * apart] = static_cast<float>(known[k]);
  each([&](int64_t image, double pixels, const double* numbers) {
    const double along = a_s - a_t * numbers[3], away = a_s * (numbers[0] - mean_s) - a_t * (numbers[1] - mean_t);
    errors[image] += along * numbers[2] * along + a_t * numbers[4] * a_t + pixels * away * away;
  });
}

std::tuple<Tensor, Tensor> correlation(std::vector<Tensor> s, std::vector<Tensor> t, double eps) {
  const Pyramid own(s), other(t, &own);
  const int64_t images = own.images(), levels = static_cast<int64_t>(own.size());
  std::vector<int64_t> firsts{0};
  for (size_t level = 0; level < own.size(); ++level) firsts.push_back(firsts.back() + own[level].channels);
  const Tensor rows = new_floats({levels, images});
  Tensor planes = new_floats({PLANES * firsts.back()});
  if (images == 0) return {rows, torch::stable::zero_(planes)};
  const ComparedParts parts(own, other, Comparison::correlation, 1);
  for_each(levels, [&](int64_t level) {
    const int64_t channels = own[level].channels;
    std::vector<double> errors(images);
    for (int64_t c = 0; c < channels; ++c) {
      of_channel(parts, own[level], level, c, eps, floats(planes) + firsts[level] + c, firsts.back(), errors);
    }
    const double divisor = 2.0 * images * own[level].pixels * channels;
    for (int64_t image = 0; image < images; ++image) floats(rows)[level * images + image] = static_cast<float>(errors[image] / divisor);
  });
  return {rows, planes};
}

// Of each row what the gradient of its level's total is multiplied by: the sum of d times the share, which is equal where the total is 0.
std::vector<float> factors_of(const float* grad, const float* rows, int64_t levels, int64_t images) {
  std::vector<float> by;
  for (int64_t level = 0; level < levels; ++level, grad += images, rows += images) {
    const double total = std::accumulate(rows, rows + images, 0.0);
    double factor = 0;
    for (int64_t image = 0; image < images; ++image) factor += grad[image] * (total == 0 ? 1.0 / images : rows[image] / total);
    by.insert(by.end(), images, static_cast<float>(factor));
  }
  return by;
}

std::vector<Tensor> correlation_backward(std::vector<Tensor> s, std::vector<Tensor> t, Tensor planes, Tensor rows, Tensor grad) {
  const Pyramid own(s), other(t, &own);
  Results out(s, own);
  const int64_t images = own.images(), levels = static_cast<int64_t>(own.size());
  int64_t channels = 0;
  for (size_t level = 0; level < own.size(); ++level) channels += own[level].channels;
  const std::vector<float> by = factors_of(floats(grad, levels * images), floats(rows, levels * images), levels, images);
  compared_gradient(own, other, floats(planes, PLANES * channels), channels, by, 1, true, out);
  return out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("correlation", TORCH_BOX(&kd::correlation));
  m.impl("correlation_backward", TORCH_BOX(&kd::correlation_backward));
}
