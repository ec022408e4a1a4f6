// `channel_kl`: the divergence of two networks' channels, each a distribution over its pixels.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "compared.h"
#include "parallel.h"

namespace kd {
namespace {

// The numbers of all of a channel: see compared.h.
struct Whole {
  double m_s, z_s, m_t, z_t, differences, second;
};

// exp(-x) - 1 + x.
double second_order(double x) { return std::expm1(-x) + x; }

// numbers: of the channel's first band, each `apart` from the next
Whole whole_of(const float* numbers, int64_t bands, int64_t apart, double k, bool entropy) {
  const int64_t count = numbers_of(entropy ? Comparison::kl : Comparison::cross_entropy);
  Whole w{numbers[0], 0, numbers[2 * apart], 0, 0, 0};
  for (int64_t band = 0; band < bands; ++band) {
    w.m_s = std::max<double>(w.m_s, numbers[band * count * apart]);
    w.m_t = std::max<double>(w.m_t, numbers[(band * count + 2) * apart]);
  }
  for (int64_t band = 0; band < bands; ++band, numbers += count * apart) {
    const double s = (numbers[0] - w.m_s) * k, t = (numbers[2 * apart] - w.m_t) * k, e = std::exp(t);
    const double of_s = numbers[apart], of_t = numbers[3 * apart], differences = numbers[4 * apart];
    const double more = of_t == 0 ? 0 : entropy ? t - s : -s;
    const double z_s = of_s * std::exp(s), z_t = of_t * e, grown = e * (differences + of_t * more);
    w.z_s += z_s, w.z_t += z_t, w.differences += grown;
    if (!entropy) continue;
    const double second = numbers[5 * apart];
    w.second += std::abs(more) < 0.5 && of_t > 0
                    ? e * ((of_t - differences + second) * second_order(more) + differences * more + second * (1 - more))
                    : z_s - z_t + grown;
  }
  return w;
}

// sum p (log p - log q), of near distributions by its second-order terms.
double divergence(const Whole& w) {
  const double mean = w.differences / w.z_t, second = w.second / w.z_t;
  if (!(std::abs(mean) < 0.5)) return mean + std::log(w.z_s / w.z_t);
  // Of differences less their mean.
  const double rest = (1 - mean + second) * second_order(-mean) - mean * mean + second * (1 + mean);
  return rest < 0 ? 0 : std::log1p(rest);
}

std::tuple<Tensor, Tensor> channel_kl(std::vector<Tensor> s, std::vector<Tensor> t, double temperature, bool entropy) {
  const Pyramid own(s), other(t, &own);
  const int64_t images = own.images(), levels = static_cast<int64_t>(own.size()), vectors = own.vectors();
  const Tensor rows = new_floats({levels, images}), planes = new_floats({4 * vectors});
  const float k = static_cast<float>(1 / temperature);
  const ComparedParts parts(own, other, entropy ? Comparison::kl : Comparison::cross_entropy, k);
  const Places places(own);
  for_each(levels * images, [&](int64_t i) {
    const size_t level = i / images;
    const int64_t image = i % images, channels = own[level].channels;
    const float* const part = parts.part(level, image);
    float* const plane = floats(planes) + places.vector[level] + image * channels;
    double value = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const Whole w = whole_of(part + c, parts.bands(level), channels, k, entropy);
      value += entropy ? divergence(w) : w.differences / w.z_t + std::log(w.z_s);
      plane[c] = static_cast<float>(w.m_s), plane[vectors + c] = static_cast<float>(1 / w.z_s);
      plane[2 * vectors + c] = static_cast<float>(w.m_t), plane[3 * vectors + c] = static_cast<float>(1 / w.z_t);
    }
    floats(rows)[i] = static_cast<float>(value);
  });
  return {rows, planes};
}

std::vector<Tensor> channel_kl_backward(std::vector<Tensor> s, std::vector<Tensor> t, Tensor planes, Tensor grad, double temperature) {
  const Pyramid own(s), other(t, &own);
  Results out(s, own);
  const int64_t rows = static_cast<int64_t>(own.size()) * own.images();
  const float* const given = floats(grad, rows);
  const float k = static_cast<float>(1 / temperature);
  std::vector<float> by(given, given + rows);
  for (float& factor : by) factor *= k;
  compared_gradient(own, other, floats(planes, 4 * own.vectors()), own.vectors(), by, k, false, out);
  return out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("channel_kl", TORCH_BOX(&kd::channel_kl));
  m.impl("channel_kl_backward", TORCH_BOX(&kd::channel_kl_backward));
}
