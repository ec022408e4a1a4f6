// `terms_persistent` on CUDA: see terms_persistent.h.
#include "terms_persistent.h"

#include <numeric>

#include "../include/terms.h"

namespace kd {
namespace {

// One launch has all levels, for its stages of one level wait for each other.
std::vector<Places> all_of(const Pyramid& x, int64_t (*blocks)(const Level&)) {
  std::vector<Places> found;
  in_launches(x, blocks, [&](const Places& places) { found.push_back(places); });
  return found;
}

// Of each level tiles(place) times numbers a tile: where they begin, and behind the last one their end.
template <class Tiles>
int64_t lay_out(const Places& places, int64_t numbers, const Tiles& tiles, int64_t (&at)[kLevels]) {
  int64_t end = 0;
  for (int i = 0; i < places.count; ++i) {
    at[i] = end;
    end += places.images * tiles(i) * numbers;
  }
  return end;
}

struct PersistentOptions {
  MapOptions map;
  std::string average;
  double temperature;
  std::vector<double> scales;
};

class PersistentCall {
 public:
  PersistentCall(const std::vector<Tensor>& s, const std::vector<Tensor>& t, const std::vector<Tensor>& gradients_s,
                 const std::vector<Tensor>& gradients_t, const Tensor& mask, const std::optional<Tensor>& factors,
                 const PersistentOptions& options)
      : options_(options),
        like_(first_of(s)),
        device_(like_),
        s_(s),
        t_(t, &s_),
        gradients_s_(gradients_s, &s_),
        gradients_t_(gradients_t, &s_),
        images_(s_.images() * static_cast<int64_t>(s_.size())),
        out_(s, s_),
        mask_(floats_beside(like_, mask, s_.maps())),
        factors_(floats_beside(like_, factors, kPersistentRows * images_)) {
    STD_TORCH_CHECK(options.scales.size() == kPersistentRows, "scales: expected one a row, ", kPersistentRows);
    STD_TORCH_CHECK(s_.size() <= kLevels, "one launch takes ", kLevels, " levels, got ", s_.size());
  }

  std::vector<Tensor> run() {
    const int64_t levels = static_cast<int64_t>(s_.size());
    const auto maps = [&] { return new_floats(like_, {s_.maps()}); };
    const auto vectors = [&] { return new_floats(like_, {s_.vectors()}); };
    std::vector<Tensor> results{new_floats(like_, {kPersistentRows, levels, s_.images()}),
                                maps(),
                                maps(),
                                vectors(),
                                new_floats(like_, {3, levels, s_.images(), STATE}),
                                vectors(),
                                maps(),
                                maps(),
                                vectors(),
                                maps()};
    if (images_ > 0) {
      by_type({&s_, &t_, &gradients_s_, &gradients_t_}, [&](auto type) {
        using X = decltype(type);
        constexpr bool taken = std::is_same_v<X, float> || std::is_same_v<X, BFloat16>;
        STD_TORCH_CHECK(taken, "features and gradients all of float32 or all of bfloat16: one launch takes no others");
        if constexpr (taken) launch<X>(results);
      });
    }
    for (Tensor& gradient : out_.finish()) results.push_back(std::move(gradient));
    return results;
  }

 private:
  template <class X>
  void launch(const std::vector<Tensor>& results) const {
    const Tensor weights_t = new_floats(like_, {s_.vectors()});
    Persistent<X> pass{};
    pass.options = options_.map;
    pass.rows = floats(results[0]), pass.state = floats(results[4]), pass.factors = factors_;
    pass.buffers = {floats(results[5]), floats(weights_t),  floats(results[3]), floats(results[8]), floats(results[1]),
                    floats(results[2]), floats(results[6]), floats(results[7]), floats(results[9]), mask_};
    std::copy(options_.scales.begin(), options_.scales.end(), pass.scales);

    const Places places = all_of(s_, read_blocks<X>)[0];
    pass.gradient.places = all_of(s_, write_blocks<X>)[0];
    // An image's features are read when the sums of its gradients are done with: what the tiles leave of both has one place.
    int64_t part[kLevels];
    const int64_t count = lay_out(places, 1, [&](int i) { return places.place[i].blocks * places.place[i].channels; }, part);
    const Tensor parts_s = new_floats(like_, {count}), parts_t = new_floats(like_, {count});
    const auto set = [&](auto& read, const Pyramid& x, const Tensor& parts) {
      read.places = places;
      read.parts = floats(parts);
      for (int i = 0; i < places.count; ++i) read.x[i] = memory_of(x[places.place[i].index]), read.part[i] = part[i];
    };
    set(pass.gradients[0], gradients_s_, parts_s), set(pass.gradients[1], gradients_t_, parts_t);
    set(pass.features[0], s_, parts_s), set(pass.features[1], t_, parts_t);
    pass.features[0].weights = pass.buffers.weights_s, pass.features[1].weights = pass.buffers.weights_t;
    pass.features[0].raw = pass.buffers.raw, pass.features[1].raw = pass.buffers.map_t;
    pass.features[0].magnitude = pass.buffers.magnitude, pass.features[1].magnitude = pass.buffers.attention_spatial;

    auto& write = pass.gradient;
    write.reads = true;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      write.x[i] = memory_of(s_[level]), write.target[i] = memory_of(t_[level]), write.out[i] = memory_of(out_[level]);
      const int64_t pixels = s_[level].pixels, channels = s_[level].channels;
      pass.divisor[i] = divisor_of(options_.average, s_.images(), pixels);
      pass.spatial_factor[i] = logit_factor(channels, options_.temperature);
      pass.channel_factor[i] = logit_factor(pixels, options_.temperature);
      const int64_t tiles[] = {2 * places.place[i].blocks, 2 * places.place[i].blocks, ceil_div(pixels, kCompared),
                               write.places.place[i].blocks};
      for (int stage = 0; stage < kStages; ++stage) pass.tiles[stage][i] = tiles[stage];
    }
    queue(pass, places);

    const auto tiles = [&](int stage) { return [&pass, stage](int i) { return pass.tiles[stage][i]; }; };
    const Tensor statistics = new_floats(like_, {lay_out(places, Persistent<X>::kStatistics, tiles(1), pass.statistics_at)});
    const Tensor sums = new_floats(like_, {lay_out(places, Persistent<X>::kSums, tiles(2), pass.sums_at)});
    const Tensor squares = new_floats(like_, {lay_out(places, 1, tiles(3), pass.squares_at)});
    const Tensor of_teacher = new_floats(like_, {images_, 2});
    pass.statistics = floats(statistics), pass.sums = floats(sums), pass.squares = floats(squares), pass.of_teacher = floats(of_teacher);
    const Tensor counters = torch::stable::new_zeros(like_, {1 + images_ * (kStages + 1)}, torch::headeronly::ScalarType::Int);
    pass.counters = static_cast<int*>(counters.mutable_data_ptr());
    device_.launch_together(pass, int64_t{pass.round} * pass.rounds);
  }

  // The order of the tiles. Between the first and the second read of an image lie a round's tiles of all other stages: so long may it take
  // to bring its sums together without anybody waiting, and so much must the cache hold.
  template <class X>
  static void queue(Persistent<X>& pass, const Places& places) {
    const int levels = places.count, ahead = levels / 2;
    int64_t tiles = 0;
    for (const auto& of_levels : pass.tiles) tiles = std::accumulate(of_levels, of_levels + levels, tiles);
    STD_TORCH_CHECK(tiles * (places.images + 2) < int64_t{1} << 30, "a queue of so many tiles: ", tiles, " an image");
    int first = 0;
    Segment* next = pass.segments;
    const auto add = [&](Stage stage, int level, int behind) {
      *next++ = {stage, level, behind, first};
      first += static_cast<int>(pass.tiles[static_cast<int>(stage)][level]);
    };
    for (int i = 0; i < levels; ++i) {
      add(Stage::weights, i, 0);
      add(Stage::sums, i, 1);
      // Half a round before it is written, of either this image or the next.
      const int compared = (i + ahead) % levels;
      add(Stage::compare, compared, i + ahead < levels ? 2 : 1);
      add(Stage::write, i, 2);
    }
    pass.round = first;
    pass.rounds = static_cast<int>(places.images) + 2;
  }

  const PersistentOptions& options_;
  const Tensor like_;
  const OnDeviceOf device_;
  const Pyramid s_, t_, gradients_s_, gradients_t_;
  const int64_t images_;
  Results out_;
  const float *const mask_, *const factors_;
};

std::vector<Tensor> terms_persistent(std::vector<Tensor> s, std::vector<Tensor> t, std::vector<Tensor> gradients_s,
                                     std::vector<Tensor> gradients_t, Tensor mask, std::optional<Tensor> factors, std::string rectify,
                                     std::string distance, double eps, bool relative, std::string average,
                                     double temperature, std::vector<double> scales) {
  const MapOptions map{rectify_of(rectify),      Normalize::minmax, Normalize::minmax, distance_of(distance),
                       static_cast<float>(eps), relative,          1};
  const PersistentOptions options{map, average, temperature, scales};
  return PersistentCall(s, t, gradients_s, gradients_t, mask, factors, options).run();
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) { m.impl("terms_persistent", TORCH_BOX(&kd::terms_persistent)); }
