// `attention` on CUDA: spatial and channel attention of the sums of |x|, and their gradient.
#include "attention.h"

#include "gradient.h"
#include "maps.h"

namespace kd {
namespace {

// Pixels of a map that a block writes. What it has to know of the whole map it works out for itself: that is small and lies in L2.
constexpr int64_t kStripe = 8192;

// What blocks have to write: the first one of each image its vector, each of the others kStripe pixels of its map.
struct Shares {
  Places places;
  // `logit_factor` of each level.
  float of_map[kLevels], of_vector[kLevels];

  Shares(const Pyramid& x, const Places& levels, double temperature) : places(levels) {
    for (int i = 0; i < places.count; ++i) {
      const Level& level = x[places.place[i].index];
      of_map[i] = logit_factor(level.channels, temperature);
      of_vector[i] = logit_factor(level.pixels, temperature);
    }
  }

  static int64_t blocks(const Level& level) { return 1 + ceil_div(level.pixels, kStripe); }

  // first: where the vector or the map begins in packed ones;   count: its elements;   begin, size: those of the block
  struct Share {
    bool of_vector;
    int64_t first, count, begin, size;
    float factor;
  };

  KD_DEVICE Share of(int64_t block) const {
    const int level = places.of(block);
    const Place& place = places.place[level];
    const int64_t within = block - place.first, n = within / place.blocks, part = within % place.blocks;
    if (part == 0) return {true, place.vector + n * place.channels, place.channels, 0, place.channels, of_vector[level]};
    const int64_t begin = (part - 1) * kStripe, left = place.pixels - begin;
    return {false, place.map + n * place.pixels, place.pixels, begin, left < kStripe ? left : kStripe, of_map[level]};
  }
};

// Packed maps and packed vectors.
template <class T>
struct MapsAndVectors {
  T *maps, *vectors;

  KD_DEVICE T* of(const Shares::Share& share) const { return (share.of_vector ? vectors : maps) + share.first; }
};

struct Attention {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  using Shared = MapScratch;

  Shares shares;
  MapsAndVectors<const float> sums;
  MapsAndVectors<float> out;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& scratch) const {
    const Shares::Share share = shares.of(me.block());
    const AttentionStatistics statistics = attention_statistics(me, scratch, sums.of(share), share.count, share.factor);
    const float* const from = sums.of(share) + share.begin;
    float* const to = out.of(share) + share.begin;
    in_turns<kInFlight>(me, share.size, [&](int64_t first, int left) {
      float a[kInFlight];
      load_turn(me, from + first, left, 0, a);
      KD_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        if (k * kMapThreads < left) to[first + k * kMapThreads] = attention_of(a[k], statistics, share.factor);
      }
    });
  }
};

// The gradient of the sums: own * (grad - sum(own * grad) / count) * factor.
struct AttentionBackward {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  using Shared = MapScratch;

  Shares shares;
  MapsAndVectors<const float> own, grad;
  MapsAndVectors<float> out;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& scratch) const {
    const Shares::Share share = shares.of(me.block());
    const float mean = weighted_sum(me, scratch, own.of(share), grad.of(share), share.count) / static_cast<float>(share.count);
    const float *const of_own = own.of(share) + share.begin, *const of_grad = grad.of(share) + share.begin;
    float* const to = out.of(share) + share.begin;
    in_turns<kInFlightOfEach>(me, share.size, [&](int64_t first, int left) {
      float s[kInFlightOfEach], g[kInFlightOfEach];
      load_turn(me, of_own + first, left, 0, s);
      load_turn(me, of_grad + first, left, 0, g);
      KD_UNROLL
      for (int k = 0; k < kInFlightOfEach; ++k) {
        if (k * kMapThreads < left) to[first + k * kMapThreads] = s[k] * (g[k] - mean) * share.factor;
      }
    });
  }
};

std::tuple<Tensor, Tensor> attention(std::vector<Tensor> x, double temperature) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  Reading wanted;
  const AttentionSums sums(x[0], levels, wanted);
  reduce(device, x[0], levels, wanted);
  return attention_of_sums(device, x[0], levels, sums, temperature);
}

std::vector<Tensor> attention_backward(std::vector<Tensor> x, Tensor spatial, Tensor channel, Tensor grad_spatial, Tensor grad_channel,
                                       double temperature) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  const int64_t maps = levels.maps(), vectors = levels.vectors();
  const MapsAndVectors<const float> own{floats_beside(x[0], spatial, maps), floats_beside(x[0], channel, vectors)};
  const MapsAndVectors<const float> grad{floats_beside(x[0], grad_spatial, maps), floats_beside(x[0], grad_channel, vectors)};
  Results out(x, levels);
  const Tensor of_pixel = new_floats(x[0], {maps}), of_channel = new_floats(x[0], {vectors});
  in_launches(levels, Shares::blocks, [&](const Places& places) {
    device.launch(AttentionBackward{{levels, places, temperature}, own, grad, {floats(of_pixel), floats(of_channel)}}, places.blocks());
  });
  Writing wanted;
  wanted.sign = {floats(of_channel), floats(of_pixel), true};
  gradient(device, x[0], levels, wanted, out);
  return out.finish();
}

}  // namespace

AttentionSums::AttentionSums(const Tensor& like, const Pyramid& x, Reading& wanted)
    : spatial(new_floats(like, {x.maps()})), channel(new_floats(like, {x.vectors()})) {
  wanted.magnitude = floats(spatial);
  wanted.sums = ChannelSums::of_magnitudes;
  wanted.channel = floats(channel);
}

std::tuple<Tensor, Tensor> attention_of_sums(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const AttentionSums& sums,
                                             double temperature) {
  const Tensor spatial = new_floats(like, {x.maps()}), channel = new_floats(like, {x.vectors()});
  const MapsAndVectors<const float> from{floats(sums.spatial), floats(sums.channel)};
  in_launches(x, Shares::blocks, [&](const Places& places) {
    device.launch(Attention{{x, places, temperature}, from, {floats(spatial), floats(channel)}}, places.blocks());
  });
  return {spatial, channel};
}

}  // namespace kd

KD_OPERATORS(m) {
  m.impl("attention", TORCH_BOX(&kd::attention));
  m.impl("attention_backward", TORCH_BOX(&kd::attention_backward));
}
