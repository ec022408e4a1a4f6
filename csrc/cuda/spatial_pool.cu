// `spatial_pool` on CUDA: the weights that a map gives its pixels, and the means under them.
#include "maps.h"
#include "reduce.h"

namespace kd {
namespace {

// Pixels of a map that a block writes. What it has to know of the whole map it works out for itself: that is small and lies in L2.
constexpr int64_t kStripe = 8192;

// The maps of a level.
//   map            where it begins in packed maps
//   first, blocks  its first block, and its blocks for one image
struct PoolLevel {
  int64_t pixels, map, first, blocks;
};

// What a block works on: `size` pixels from `begin` on of a map of `count`, which begins at `first`.
struct Stripe {
  int64_t first, count, begin, size;

  KD_DEVICE Stripe(const PlacesOf<PoolLevel>& places, int64_t block) {
    const PoolLevel& level = places.place[places.of(block)];
    const int64_t within = block - level.first;
    count = level.pixels, first = level.map + within / level.blocks * count, begin = within % level.blocks * kStripe;
    size = count - begin < kStripe ? count - begin : kStripe;
  }
};

// Calls take(index, value, other) for the thread's elements of `from` and `beside`, which lie at the same places.
template <class Me, class Take>
KD_DEVICE void each_of_two(Me& me, const float* from, const float* beside, int64_t count, const Take& take) {
  in_turns<kInFlightOfEach>(me, count, [&](int64_t first, int left) {
    float value[kInFlightOfEach], other[kInFlightOfEach];
    load_turn(me, from + first, left, 0, value);
    load_turn(me, beside + first, left, 0, other);
    KD_UNROLL
    for (int k = 0; k < kInFlightOfEach; ++k) {
      if (k * Me::kThreads < left) take(first + k * Me::kThreads, value[k], other[k]);
    }
  });
}

// a over the sum of its map, 0 where that is 0, or the softmax of the map.
struct PoolWeights {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  using Shared = MapScratch;

  PlacesOf<PoolLevel> places;
  const float* a;
  float* out;
  bool softmax;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& scratch) const {
    const Stripe at(places, me.block());
    const float* const map = a + at.first;
    float maximum = 0;
    if (softmax) {
      // Not infinite: the difference of -inf from it is to be none.
      float high[1] = {-FLT_MAX};
      in_turns<kInFlight>(me, at.count, [&](int64_t first, int left) {
        float value[kInFlight];
        load_turn(me, map + first, left, -FLT_MAX, value);
        KD_UNROLL
        for (int k = 0; k < kInFlight; ++k) high[0] = larger(high[0], value[k]);
      });
      join_all(me, scratch, high, [](int, float x, float y) { return larger(x, y); });
      maximum = high[0];
    }
    float total[1] = {};
    in_turns<kInFlight>(me, at.count, [&](int64_t first, int left) {
      float value[kInFlight], turn = 0;
      load_turn(me, map + first, left, 0, value);
      KD_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        if (k * kThreads < left) turn += softmax ? expf(value[k] - maximum) : value[k];
      }
      total[0] += turn;
    });
    sum_all(me, scratch, total);
    in_turns<kInFlight>(me, at.size, [&](int64_t first, int left) {
      float value[kInFlight];
      load_turn(me, map + at.begin + first, left, 0, value);
      KD_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        if (k * kThreads >= left) continue;
        const float share = softmax ? expf(value[k] - maximum) / total[0] : total[0] == 0 ? 0.0f : value[k] / total[0];
        out[at.first + at.begin + first + k * kThreads] = share;
      }
    });
  }
};

// (grad - sum(grad * weights)) times the weight with softmax, else over the sum of a.
struct PoolWeightsBackward {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  using Shared = MapScratch;

  PlacesOf<PoolLevel> places;
  const float *weights, *grad, *a;
  float* out;
  bool softmax;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& scratch) const {
    const Stripe at(places, me.block());
    const float mean = weighted_sum(me, scratch, weights + at.first, grad + at.first, at.count);
    const float total = softmax ? 1.0f : weighted_sum(me, scratch, a + at.first, nullptr, at.count);
    const int64_t from = at.first + at.begin;
    each_of_two(me, weights + from, grad + from, at.size, [&](int64_t i, float weight, float slope) {
      out[from + i] = softmax ? weight * (slope - mean) : total == 0 ? 0.0f : (slope - mean) / total;
    });
  }
};

// Launches a pass of blocks for the stripes of packed maps of these levels.
template <class Pass>
void launch_on_maps(const OnDeviceOf& device, Pass pass, int64_t images, const std::vector<PoolLevel>& levels) {
  in_launches(images, levels, [&](const PlacesOf<PoolLevel>& places) {
    pass.places = places;
    device.launch(pass, places.blocks());
  });
}

std::vector<PoolLevel> levels_of(int64_t images, const std::vector<int64_t>& pixels) {
  std::vector<PoolLevel> levels;
  int64_t map = 0;
  for (const int64_t count : pixels) {
    STD_TORCH_CHECK(count > 0, "a map without pixels");
    levels.push_back({count, map, 0, ceil_div(count, kStripe)});
    map += images * count;
  }
  return levels;
}

int64_t elements_of(int64_t images, const std::vector<int64_t>& pixels) {
  int64_t elements = 0;
  for (const int64_t count : pixels) elements += images * count;
  return elements;
}

Tensor pool_weights(Tensor a, int64_t images, std::vector<int64_t> pixels, bool softmax) {
  const OnDeviceOf device(a);
  const float* const from = floats_beside(a, a, elements_of(images, pixels));
  const Tensor weights = torch::stable::empty_like(a);
  launch_on_maps(device, PoolWeights{{}, from, floats(weights), softmax}, images, levels_of(images, pixels));
  return weights;
}

Tensor pool_weights_backward(Tensor weights, Tensor grad, Tensor a, int64_t images, std::vector<int64_t> pixels, bool softmax) {
  const OnDeviceOf device(a);
  const int64_t count = elements_of(images, pixels);
  const Tensor result = torch::stable::empty_like(a);
  const PoolWeightsBackward pass{{}, floats_beside(a, weights, count), floats_beside(a, grad, count), floats_beside(a, a, count),
                                 floats(result), softmax};
  launch_on_maps(device, pass, images, levels_of(images, pixels));
  return result;
}

Tensor spatial_pool(std::vector<Tensor> x, Tensor weights) {
  const OnDeviceOf device(first_of(x));
  const Pyramid levels(x);
  const Tensor means = new_floats(x[0], {levels.vectors()});
  Reading wanted;
  wanted.sums = ChannelSums::of_values;
  wanted.pixel_weights = floats_beside(x[0], weights, levels.maps());
  wanted.channel = floats(means);
  reduce(device, x[0], levels, wanted);
  return means;
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("pool_weights", TORCH_BOX(&kd::pool_weights));
  m.impl("pool_weights_backward", TORCH_BOX(&kd::pool_weights_backward));
  m.impl("spatial_pool", TORCH_BOX(&kd::spatial_pool));
}
