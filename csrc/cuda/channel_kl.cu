// `channel_kl` on CUDA: the divergence of two networks' channels, each a distribution over its pixels, and its gradient.
#include <tuple>

#include "compared.h"
#include "compared_write.h"

namespace kd {
namespace {

// An image's bands brought together: 32 channels of it by a block, whose warps take the bands in turns.
//   planes  m_s, 1 / z_s, m_t and 1 / z_t, each packed (N, C);   values: packed (N, C), what each channel adds to its row
template <Comparison kKind>
struct JoinBands {
  using Part = ComparedNumbers<kKind>;
  static constexpr int kThreads = 256, kResident = 4, kWarps = kThreads / kWarp;
  struct Shared {
    float numbers[kWarps][Part::kCount][kWarp];
  };

  Places places;
  // Of each level where its parts begin, and how many an image has.
  int64_t part[kLevels], bands[kLevels];
  const float* parts;
  float *planes, *values;
  int64_t apart;
  float k;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks, c = within % place.blocks * kWarp + me.lane();
    const bool inside = c < place.channels;
    const float* const from = parts + part[level] + n * bands[level] * Part::kCount * place.channels + c;
    Part found = Part::none();
    for (int64_t band = me.warp(); band < bands[level] && inside; band += kWarps) {
      Part other;
      KD_UNROLL
      for (int i = 0; i < Part::kCount; ++i) other.v[i] = from[(band * Part::kCount + i) * place.channels];
      found.join(other, 0, 0, k);
    }
    KD_UNROLL
    for (int i = 0; i < Part::kCount; ++i) shared.numbers[me.warp()][i][me.lane()] = found.v[i];
    me.sync();
    if (me.warp() != 0 || !inside) return;
    for (int warp = 1; warp < kWarps; ++warp) {
      Part other;
      KD_UNROLL
      for (int i = 0; i < Part::kCount; ++i) other.v[i] = shared.numbers[warp][i][me.lane()];
      found.join(other, 0, 0, k);
    }
    const float m_s = found.v[0], z_s = found.v[1], m_t = found.v[2], z_t = found.v[3], mean = found.v[4] / z_t;
    const int64_t at = place.vector + n * place.channels + c;
    planes[at] = m_s, planes[apart + at] = 1 / z_s, planes[2 * apart + at] = m_t, planes[3 * apart + at] = 1 / z_t;
    if constexpr (kKind == Comparison::kl) {
      values[at] = divergence(mean, found.v[5] / z_t, z_s / z_t);
    } else {
      values[at] = mean + logf(z_s);
    }
  }

 private:
  // sum p (log p - log q), from the sums over z_t and z_s / z_t: of near distributions by its second-order terms.
  KD_DEVICE static float divergence(float mean, float second, float ratio) {
    if (!(fabsf(mean) < 0.5f)) return mean + logf(ratio);
    // Of differences less their mean.
    const float rest = (1 - mean + second) * second_order(-mean) - mean * mean + second * (1 + mean);
    return rest < 0 ? 0.0f : log1pf(rest);
  }
};

// A row by a block: the sum of its channels' values.
struct SumChannels {
  static constexpr int kThreads = 128, kResident = 4, kWarps = kThreads / kWarp;
  struct Shared {
    float of_warp[kWarps];
  };

  Places places;
  const float* values;
  float* rows;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const Place& place = places.place[places.of(me.block())];
    const int64_t n = me.block() - place.first;
    const float* const from = values + place.vector + n * place.channels;
    float total = 0;
    for (int64_t c = me.index(); c < place.channels; c += kThreads) total += from[c];
    total = block_sum(me, total, shared.of_warp, kWarps);
    if (me.index() == 0) rows[place.index * places.images + n] = total;
  }
};

template <Comparison kKind>
void rows_of(const OnDeviceOf& device, const Tensor& like, const Pyramid& s, const Pyramid& t, float k, float* rows, float* planes) {
  const ComparedParts parts = compared_read<kKind>(device, like, s, t, k);
  const Tensor values = new_floats(like, {s.vectors()});
  JoinBands<kKind> join{};
  join.parts = floats(parts.parts), join.planes = planes, join.values = floats(values), join.apart = s.vectors(), join.k = k;
  in_launches(s, [](const Level& level) { return ceil_div<int64_t>(level.channels, kWarp); }, [&](const Places& places) {
    join.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      join.part[i] = parts.firsts[level], join.bands[i] = compared_bands(s[level]);
    }
    device.launch(join, places.blocks());
  });
  in_launches(s, [](const Level&) { return int64_t{1}; }, [&](const Places& places) {
    device.launch(SumChannels{places, floats(values), rows}, places.blocks());
  });
}

std::tuple<Tensor, Tensor> channel_kl(std::vector<Tensor> s, std::vector<Tensor> t, double temperature, bool entropy) {
  const OnDeviceOf device(first_of(s));
  const Pyramid own(s), other(t, &own);
  const Tensor rows = new_floats(s[0], {static_cast<int64_t>(own.size()), own.images()}), planes = new_floats(s[0], {4 * own.vectors()});
  const auto run = entropy ? rows_of<Comparison::kl> : rows_of<Comparison::cross_entropy>;
  run(device, s[0], own, other, static_cast<float>(1 / temperature), floats(rows), floats(planes));
  return {rows, planes};
}

std::vector<Tensor> channel_kl_backward(std::vector<Tensor> s, std::vector<Tensor> t, Tensor planes, Tensor grad, double temperature) {
  const OnDeviceOf device(first_of(s));
  const Pyramid own(s), other(t, &own);
  const int64_t rows = static_cast<int64_t>(own.size()) * own.images(), vectors = own.vectors();
  const float* const known = floats_beside(s[0], planes, 4 * vectors);
  Results out(s, own);
  compared_write<false>(device, own, other, known, vectors, floats_beside(s[0], grad, rows), nullptr, static_cast<float>(1 / temperature),
                        out);
  return out.finish();
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("channel_kl", TORCH_BOX(&kd::channel_kl));
  m.impl("channel_kl_backward", TORCH_BOX(&kd::channel_kl_backward));
}
