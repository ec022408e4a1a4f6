// `correlation` on CUDA: the distance of features normalised per channel over the batch, and its gradient. The formulas are those of
// kdkernels/triton/correlation.py.
#include <tuple>

#include "compared.h"
#include "compared_write.h"

namespace kd {
namespace {

using Part = ComparedNumbers<Comparison::correlation>;
// What is known of a channel: five numbers for the gradient, and a_s, a_t and both means for the rows.
constexpr int kPlanes = 9;

// The levels of a launch as both kernels take them.
struct Moments {
  Places places;
  // Of each level where its parts begin, how many an image has, and the pixels of one but for the last.
  int64_t part[kLevels], bands[kLevels], length[kLevels];
  const float* parts;
  float* planes;
  int64_t apart;

  KD_DEVICE float pixels_of(int level, int64_t band) const {
    const int64_t left = places.place[level].pixels - band * length[level];
    return static_cast<float>(left < length[level] ? left : length[level]);
  }
  KD_DEVICE Part part_of(int level, int64_t band, int64_t c) const {
    const int64_t channels = places.place[level].channels;
    Part found;
    KD_UNROLL
    for (int i = 0; i < Part::kCount; ++i) found.v[i] = parts[part[level] + (band * Part::kCount + i) * channels + c];
    return found;
  }
  KD_DEVICE float* plane_of(int level, int64_t c) const { return planes + places.place[level].vector / places.images + c; }
};

// What is known of 32 channels of a level: by a block whose warps take the bands of all images in turns.
struct KnowChannels {
  static constexpr int kThreads = 512, kResident = 1, kWarps = kThreads / kWarp;
  struct Shared {
    float numbers[kWarps][Part::kCount][kWarp];
    float pixels[kWarps];
  };

  Moments moments;
  Memory s[kLevels], t[kLevels];
  float eps;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    int64_t block = me.block();
    int level = 0;
    for (; block >= groups(level); ++level) block -= groups(level);
    const Place& place = moments.places.place[level];
    const int64_t c = block * kWarp + me.lane(), images = moments.places.images;
    const bool inside = c < place.channels;
    Part found = Part::none();
    float pixels = 0;
    for (int64_t band = me.warp(); band < images * moments.bands[level]; band += kWarps) {
      const float others = moments.pixels_of(level, band % moments.bands[level]);
      if (inside) found.join(moments.part_of(level, band, c), pixels, others, 0);
      pixels += others;
    }
    KD_UNROLL
    for (int i = 0; i < Part::kCount; ++i) shared.numbers[me.warp()][i][me.lane()] = found.v[i];
    if (me.lane() == 0) shared.pixels[me.warp()] = pixels;
    me.sync();
    if (me.warp() != 0 || !inside) return;
    for (int warp = 1; warp < kWarps; ++warp) {
      Part other;
      KD_UNROLL
      for (int i = 0; i < Part::kCount; ++i) other.v[i] = shared.numbers[warp][i][me.lane()];
      found.join(other, pixels, shared.pixels[warp], 0);
      pixels += shared.pixels[warp];
    }
    const auto& [mean_s, mean_t, of_s, slope, rest] = found.v;
    const float values = static_cast<float>(images * place.pixels), others = values > 1 ? values - 1 : 1.0f;
    const float a_s = 1 / (sqrtf(of_s / others) + eps), a_t = 1 / (sqrtf((rest + slope * of_s * slope) / others) + eps);
    const float by = 1 / (values * static_cast<float>(place.channels));
    const float v = -a_s * a_t * by, u = a_s * a_s * eps * (a_s - a_t * slope) * by - v * slope;
    const int64_t first = place.last ? c : c * place.pixels;
    const float of_s_first = element_at(s[level], first), of_t_first = element_at(t[level], first), w = -u * mean_s - v * mean_t;
    const float known[kPlanes] = {of_s_first, u, of_t_first, v, w, a_s, a_t, mean_s, mean_t};
    KD_UNROLL
    for (int i = 0; i < kPlanes; ++i) moments.plane_of(level, c)[i * moments.apart] = known[i];
  }

  KD_DEVICE int64_t groups(int level) const { return ceil_div<int64_t>(moments.places.place[level].channels, kWarp); }
};

// A row by a block: its part of the sum of (z_s - z_t)^2, over twice the values of the level.
struct SumErrors {
  static constexpr int kThreads = 512, kResident = 1, kWarps = kThreads / kWarp;
  struct Shared {
    float of_warp[kWarps];
  };

  Moments moments;
  float* rows;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const Places& places = moments.places;
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t n = me.block() - place.first, bands = moments.bands[level];
    float total = 0;
    for (int64_t i = me.index(); i < bands * place.channels; i += kThreads) {
      const int64_t band = i / place.channels, c = i % place.channels;
      const float* const plane = moments.plane_of(level, c);
      const float a_s = plane[5 * moments.apart], a_t = plane[6 * moments.apart];
      const auto [mean_s, mean_t, of_s, slope, rest] = moments.part_of(level, n * bands + band, c).v;
      const float along = a_s - a_t * slope, away = a_s * (mean_s - plane[7 * moments.apart]) - a_t * (mean_t - plane[8 * moments.apart]);
      total += along * of_s * along + a_t * rest * a_t + moments.pixels_of(level, band) * away * away;
    }
    total = block_sum(me, total, shared.of_warp, kWarps);
    const float values = 2.0f * static_cast<float>(places.images) * static_cast<float>(place.pixels) * static_cast<float>(place.channels);
    if (me.index() == 0) rows[place.index * places.images + n] = total / values;
  }
};

int64_t channels_of(const Pyramid& x) {
  int64_t sum = 0;
  for (size_t level = 0; level < x.size(); ++level) sum += x[level].channels;
  return sum;
}

std::tuple<Tensor, Tensor> correlation(std::vector<Tensor> s, std::vector<Tensor> t, double eps) {
  const OnDeviceOf device(first_of(s));
  const Pyramid own(s), other(t, &own);
  const int64_t channels = channels_of(own);
  const Tensor rows = new_floats(s[0], {static_cast<int64_t>(own.size()), own.images()});
  Tensor planes = new_floats(s[0], {kPlanes * channels});
  if (own.images() == 0) return {rows, torch::stable::zero_(planes)};
  const ComparedParts parts = compared_read<Comparison::correlation>(device, s[0], own, other, 1);
  in_launches(own, [](const Level&) { return int64_t{1}; }, [&](const Places& places) {
    KnowChannels know{};
    Moments& moments = know.moments;
    moments.places = places;
    moments.parts = floats(parts.parts), moments.planes = floats(planes), moments.apart = channels;
    know.eps = static_cast<float>(eps);
    int64_t blocks = 0;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      moments.part[i] = parts.firsts[level], moments.bands[i] = compared_bands(own[level]);
      moments.length[i] = own[level].last ? kComparedPixels : kComparedBand;
      know.s[i] = memory_of(own[level]), know.t[i] = memory_of(other[level]);
      blocks += ceil_div<int64_t>(own[level].channels, kWarp);
    }
    device.launch(know, blocks);
    device.launch(SumErrors{moments, floats(rows)}, places.blocks());
  });
  return {rows, planes};
}

std::vector<Tensor> correlation_backward(std::vector<Tensor> s, std::vector<Tensor> t, Tensor planes, Tensor rows, Tensor grad) {
  const OnDeviceOf device(first_of(s));
  const Pyramid own(s), other(t, &own);
  const int64_t count = static_cast<int64_t>(own.size()) * own.images(), channels = channels_of(own);
  const float* const known = floats_beside(s[0], planes, kPlanes * channels);
  const float *const given = floats_beside(s[0], grad, count), *const shares = floats_beside(s[0], rows, count);
  Results out(s, own);
  compared_write<true>(device, own, other, known, channels, given, shares, 1, out);
  return out.finish();
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("correlation", TORCH_BOX(&kd::correlation));
  m.impl("correlation_backward", TORCH_BOX(&kd::correlation_backward));
}
