// What `logit_bce` and `logit_kl` share on CUDA: a pass over both networks' logits that leaves a sum a block or writes the gradient, and a
// second one that adds up the blocks of each level and image in a fixed order. An element takes so much arithmetic that vectors of several
// would not make it faster.
#pragma once

#include <vector>

#include "launch.h"
#include "levels.h"
#include "maps.h"
#include "sums.h"

namespace kd {

KD_DEVICE void write_element(char* to, Type type, int64_t at, float x) {
  if (type == Type::fp32) {
    reinterpret_cast<float*>(to)[at] = x;
  } else {
    reinterpret_cast<uint16_t*>(to)[at] = type == Type::fp16 ? float_to_half(x) : float_to_bfloat16(x);
  }
}

// The levels of a launch.
//   weight  packed maps, null for 1;   grad: (L, N), null where sums are wanted
//   out     of each level, for the gradient;   parts: a sum a block
struct LogitLevels {
  Places places;
  Memory s[kLevels], t[kLevels];
  char* out[kLevels];
  const float *weight, *grad;
  float* parts;
};

// What a block works on.
//   first       its image's first element;   tile: the block's number within the image
//   scale       the gradient's factor
struct LogitImage {
  const Place& place;
  const Memory &s, &t;
  char* out;
  const float* weight;
  int64_t first, tile;
  float scale;

  KD_DEVICE static LogitImage of(const LogitLevels& levels, int64_t block) {
    const int level = levels.places.of(block);
    const Place& place = levels.places.place[level];
    const int64_t within = block - place.first, n = within / place.blocks;
    return {place,
            levels.s[level],
            levels.t[level],
            levels.out[level],
            levels.weight != nullptr ? levels.weight + place.map + n * place.pixels : nullptr,
            n * place.channels * place.pixels,
            within % place.blocks,
            levels.grad != nullptr ? levels.grad[place.index * levels.places.images + n] : 1.0f};
  }

  KD_DEVICE float weight_of(int64_t pixel) const { return weight != nullptr ? weight[pixel] : 1.0f; }
};

// A level and image a block.
struct SumLogits {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  using Shared = MapScratch;

  Places places;
  const float* parts;
  float* rows;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& scratch) const {
    const int64_t n = me.block() % places.images;
    const Place& place = places.place[me.block() / places.images];
    const float total = weighted_sum(me, scratch, parts + place.first + n * place.blocks, nullptr, place.blocks);
    if (me.index() == 0) rows[place.index * places.images + n] = total;
  }
};

// Both networks' logits on their device.
class Logits {
 public:
  Logits(const std::vector<Tensor>& s, const std::vector<Tensor>& t, const std::optional<Tensor>& weight)
      : device_(first_of(s)), tensors_(s), s_(s), t_(t, &s_), weight_(floats_beside(s[0], weight, s_.maps())) {}

  // (L, N), by a kernel made of `LogitLevels` by make(levels). blocks: (level) -> blocks for one image of it
  template <class Blocks, class Make>
  Tensor rows(const Blocks& blocks, const Make& make) const {
    const Tensor result = new_floats(tensors_[0], {static_cast<int64_t>(s_.size()), s_.images()});
    in_launches(s_, blocks, [&](const Places& places) {
      LogitLevels levels = read(places);
      const Tensor parts = new_floats(tensors_[0], {places.blocks()});
      levels.parts = floats(parts);
      device_.launch(make(levels), places.blocks());
      device_.launch(SumLogits{places, levels.parts, floats(result)}, places.count * places.images);
    });
    return result;
  }

  // The gradient of s from that of the rows.
  template <class Blocks, class Make>
  std::vector<Tensor> gradient(const Tensor& grad, const Blocks& blocks, const Make& make) const {
    Results out(tensors_, s_);
    const float* const of_rows = floats_beside(tensors_[0], grad, static_cast<int64_t>(s_.size()) * s_.images());
    in_launches(s_, blocks, [&](const Places& places) {
      LogitLevels levels = read(places);
      levels.grad = of_rows;
      for (int i = 0; i < places.count; ++i) levels.out[i] = out[places.place[i].index].data;
      device_.launch(make(levels), places.blocks());
    });
    return out.finish();
  }

 private:
  LogitLevels read(const Places& places) const {
    LogitLevels levels{};
    levels.places = places;
    levels.weight = weight_;
    for (int i = 0; i < places.count; ++i) {
      levels.s[i] = memory_of(s_[places.place[i].index]);
      levels.t[i] = memory_of(t_[places.place[i].index]);
    }
    return levels;
  }

  const OnDeviceOf device_;
  const std::vector<Tensor>& tensors_;
  const Pyramid s_, t_;
  const float* const weight_;
};

}  // namespace kd
