// The numbers of `terms`: the rows from what the read pass leaves, and what the write pass multiplies for upstream gradients.
#pragma once

#include "gradient.h"
#include "maps.h"
#include "sums.h"

namespace kd {

// Imitations of one call, and rows: kernels take what belongs to them by value, for a copy from the host would have to be waited for.
constexpr int kImitations = 64;
constexpr int kTermRows = 3 + kImitations;

// What has a state: the map, and the attention over pixels and over channels.
constexpr int kKinds = 3;

// What both kernels are given. Maps are packed (N, P) level after level, vectors packed (N, C).
//   raw, map_t           the map's, null without;                     map_spatial: null is 1
//   magnitude, ...       the attention's, null without
//   spatial              of each imitation, null is 1
//   factors              (rows, L, N), null is 1;                     scales: of each row besides
//   state                (3, L, N, STATE), of the map and of both attentions
//   images               of all levels
//   divisor, ..._factor  of each level of the launch: of the map's distance, and from sums to the softmaxes' arguments
struct TermNumbers {
  MapOptions options;
  const float *raw, *map_t, *map_spatial;
  const float *magnitude, *attention_spatial, *channel_sums, *attention_channel;
  const float *spatial[kImitations], *factors;
  float* state;
  int64_t images;
  float divisor[kLevels], spatial_factor[kLevels], channel_factor[kLevels], scales[kTermRows];
  int imitations;

  // The row of a kind, and behind the kinds of an imitation.
  KD_DEVICE int row_of(int kind) const {
    const int attention = raw != nullptr ? 1 : 0;
    if (kind < kKinds) return kind == 0 ? 0 : attention + kind - 1;
    return attention + (magnitude != nullptr ? 2 : 0) + kind - kKinds;
  }
  // place: of a level's image among those of the whole pyramid
  KD_DEVICE float factor(int row, int64_t place) const {
    return factors != nullptr ? scales[row] * factors[row * images + place] : scales[row];
  }
  KD_DEVICE float* state_of(int kind, int64_t place) const { return state + (kind * images + place) * STATE; }
};

KD_DEVICE const float* behind(const float* packed, int64_t count) { return packed != nullptr ? packed + count : nullptr; }

// A number of one level and image a block: of the map, of the attention over pixels and over channels, and of each imitation. Fills the
// state of the first three, with zeros where they are not wanted.
//
// error  maps of the imitations' squared errors;   rows: (rows, L, N)
struct EvaluateTerms {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  struct Shared {
    MapScratch maps;
    // What the block makes. A map's distance leaves no register to keep it in.
    int row;
    int64_t image;
  };

  Places places;
  TermNumbers terms;
  const float* error;
  float* rows;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks;
    const int kind = static_cast<int>(within % place.blocks);
    const int64_t image = place.index * places.images + n;
    const int64_t map = place.map + n * place.pixels, vector = place.vector + n * place.channels;
    float* const state = kind < kKinds ? terms.state_of(kind, image) : nullptr;
    if (state != nullptr && me.index() < STATE) state[me.index()] = 0;
    if (me.index() == 0) shared.row = terms.row_of(kind), shared.image = image;
    me.sync();
    float value;
    if (kind == 0) {
      if (terms.raw == nullptr) return;
      value = map_forward(me, shared.maps, terms.raw + map, terms.map_t + map, behind(terms.map_spatial, map), state, place.pixels,
                          terms.divisor[level], terms.options);
    } else if (kind < kKinds) {
      if (terms.magnitude == nullptr) return;
      const bool over_pixels = kind == 1;
      value = attention_distance(me, shared.maps, over_pixels ? terms.magnitude + map : terms.channel_sums + vector,
                                 over_pixels ? terms.attention_spatial + map : terms.attention_channel + vector, state,
                                 over_pixels ? place.pixels : place.channels,
                                 over_pixels ? terms.spatial_factor[level] : terms.channel_factor[level]);
    } else {
      value = weighted_sum(me, shared.maps, error + map, behind(terms.spatial[kind - kKinds], map), place.pixels);
    }
    if (me.index() == 0) rows[shared.row * terms.images + shared.image] = value * terms.factor(shared.row, shared.image);
  }
};

// What the write pass multiplies by channel and by pixel, made by each block for its tile.
//
// weights, channel  vectors: of the map, and of the imitations, where null is 1
// grad              (rows, L, N), the upstream gradients, null for 1
struct TermSlopes {
  TermNumbers terms;
  const float *weights, *channel, *grad;

  template <unsigned kTerms>
  KD_DEVICE Numbers of_channel(const ImageOfLevel& image, int64_t c) const {
    Numbers made{0, 0, 1};
    if ((kTerms & kProduct) && terms.raw != nullptr) made.product = weights[image.vector + c];
    if ((kTerms & kSign) && terms.magnitude != nullptr) {
      made.sign = attention_gradient(terms.channel_sums + image.vector, terms.attention_channel + image.vector,
                                     terms.state_of(2, image.number), upstream(2, image.number), c, image.place.channels,
                                     terms.channel_factor[image.level]);
    }
    if ((kTerms & kSquares) && channel != nullptr) made.error = channel[image.vector + c];
    return made;
  }

  template <unsigned kTerms>
  KD_DEVICE Numbers of_pixel(const ImageOfLevel& image, int64_t p) const {
    Numbers made{0, 0, 0};
    if ((kTerms & kProduct) && terms.raw != nullptr) {
      made.product = map_gradient(terms.raw + image.map, terms.map_t + image.map, behind(terms.map_spatial, image.map),
                                  terms.state_of(0, image.number), upstream(0, image.number), p, terms.divisor[image.level], terms.options);
    }
    if ((kTerms & kSign) && terms.magnitude != nullptr) {
      made.sign = attention_gradient(terms.magnitude + image.map, terms.attention_spatial + image.map, terms.state_of(1, image.number),
                                     upstream(1, image.number), p, image.place.pixels, terms.spatial_factor[image.level]);
    }
    for (int k = 0; (kTerms & kSquares) && k < terms.imitations; ++k) {
      // The 2 of a square's derivative.
      const float d = 2.0f * upstream(kKinds + k, image.number);
      made.error += terms.spatial[k] != nullptr ? d * terms.spatial[k][image.map + p] : d;
    }
    return made;
  }

 private:
  KD_DEVICE float upstream(int kind, int64_t image) const {
    const int row = terms.row_of(kind);
    const float own = terms.factor(row, image);
    return grad != nullptr ? own * grad[row * terms.images + image] : own;
  }
};

// 1 if all numbers are 1, else 0. In one block.
struct AllOnes {
  static constexpr int kThreads = 512, kResident = 2, kWarps = kThreads / kWarp;
  struct Shared {
    float of_warp[kWarps];
  };

  const float* values;
  int64_t count;
  int* result;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    float others = 0;
    for (int64_t i = me.index(); i < count; i += kThreads) others = values[i] == 1.0f ? others : 1.0f;
    others = block_sum(me, others, shared.of_warp, kWarps);
    if (me.index() == 0) *result = others == 0.0f ? 1 : 0;
  }
};

}  // namespace kd
