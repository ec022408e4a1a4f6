// Two pyramids compared channel by channel, for `channel_kl` and `correlation`: one read of both, which leaves some numbers of each channel
// of a band, and the write pass. The formulas are those of kdkernels/triton/compared_read.py and compared_write.py.
#pragma once

#include <cfloat>
#include <type_traits>

#include "launch.h"
#include "levels.h"
#include "sums.h"

namespace kd {

enum class Comparison { kl, cross_entropy, correlation };

// The numbers of a channel of some pixels.
//   kl, cross_entropy  m_s, the largest value of s, and z_s = sum exp((s - m_s) k), the same of t, and with e_t = exp((t - m_t) k) the
//                      sum of e_t d, d = (t - m_t) k - (s - m_s) k or, of cross_entropy, (m_s - s) k; of kl also the sum of
//                      e_t (exp(-d) - 1 + d), in which near distributions keep their digits
//   correlation        means a and b of s and t less their origins, X = sum (s - a)^2, the slope of t by s and what it leaves of t,
//                      sum (t - b - slope (s - a))^2
template <Comparison kKind>
struct ComparedNumbers {
  static constexpr bool kMoments = kKind == Comparison::correlation, kDivergence = kKind == Comparison::kl;
  static constexpr int kCount = kDivergence ? 6 : 5;
  float v[kCount];

  // Of no pixel. The largest value is finite, so that values of -inf are smaller and differ from it by no NaN.
  KD_DEVICE static ComparedNumbers none() {
    ComparedNumbers made{};
    if (!kMoments) made.v[0] = made.v[2] = -FLT_MAX;
    return made;
  }

  // Those of the first `count` of these pixels, joined to those of `before` others.
  template <int kMost>
  KD_DEVICE void add(const float (&s)[kMost], const float (&t)[kMost], int count, float before, float k) {
    if constexpr (kMoments) {
      const float pixels = static_cast<float>(count), one = 1.0f / (count > 0 ? pixels : 1.0f);
      ComparedNumbers made{};
      KD_UNROLL
      for (int i = 0; i < kMost; ++i) {
        made.v[0] += i < count ? s[i] : 0.0f;
        made.v[1] += i < count ? t[i] : 0.0f;
      }
      made.v[0] *= one, made.v[1] *= one;
      float of_both = 0;
      KD_UNROLL
      for (int i = 0; i < kMost; ++i) {
        const float x = i < count ? s[i] - made.v[0] : 0.0f, y = i < count ? t[i] - made.v[1] : 0.0f;
        made.v[2] += x * x, of_both += x * y;
      }
      made.v[3] = slope_of(made.v[2], of_both);
      KD_UNROLL
      for (int i = 0; i < kMost; ++i) {
        const float rest = i < count ? t[i] - made.v[1] - made.v[3] * (s[i] - made.v[0]) : 0.0f;
        made.v[4] += rest * rest;
      }
      join(made, before, pixels, k);
    } else {
      float top_s = v[0], top_t = v[2];
      KD_UNROLL
      for (int i = 0; i < kMost; ++i) {
        top_s = i < count ? fmaxf(top_s, s[i]) : top_s;
        top_t = i < count ? fmaxf(top_t, t[i]) : top_t;
      }
      raise(top_s, top_t, k);
      KD_UNROLL
      for (int i = 0; i < kMost; ++i) {
        if (i < count) add(s[i], t[i], k);
      }
    }
  }

  // Those of `mine` and of `others` pixels together.
  KD_DEVICE void join(ComparedNumbers other, float mine, float others, float k) {
    if constexpr (kMoments) {
      const float all = mine + others, share = others / (all > 0 ? all : 1.0f), weight = mine * share;
      const float s = other.v[0] - v[0], t = other.v[1] - v[1], squares = v[2] + other.v[2] + s * s * weight;
      const float slope = slope_of(squares, v[3] * v[2] + other.v[3] * other.v[2] + s * t * weight);
      const float first = v[3] - slope, second = other.v[3] - slope, between = t - slope * s;
      v[0] += s * share, v[1] += t * share;
      v[4] += other.v[4] + first * v[2] * first + second * other.v[2] * second + between * between * weight;
      v[2] = squares, v[3] = slope;
    } else {
      const float top_s = fmaxf(v[0], other.v[0]), top_t = fmaxf(v[2], other.v[2]);
      raise(top_s, top_t, k);
      other.raise(top_s, top_t, k);
      v[1] += other.v[1], v[3] += other.v[3], v[4] += other.v[4];
      if constexpr (kDivergence) v[5] += other.v[5];
    }
  }

 private:
  KD_DEVICE static float slope_of(float of_s, float of_both) { return of_s > 0 ? of_both / of_s : 0.0f; }

  // One pixel, none of whose values is larger than the largest.
  KD_DEVICE void add(float s, float t, float k) {
    s -= v[0], t -= v[2];
    const float e_s = expf(s * k), e_t = expf(t * k), d = (kDivergence ? t - s : -s) * k;
    v[1] += e_s, v[3] += e_t, v[4] += e_t * d;
    if constexpr (kDivergence) v[5] += fabsf(d) < 0.5f && e_t > 0 ? e_t * second_order(d) : e_s - e_t + e_t * d;
  }

  // The same numbers as of larger largest values.
  KD_DEVICE void raise(float top_s, float top_t, float k) {
    const float s = (v[0] - top_s) * k, t = (v[2] - top_t) * k, e = expf(t);
    // What differences grow by. Of no pixel the step is out of all bounds.
    const float more = v[3] == 0 ? 0.0f : kDivergence ? t - s : -s, z_s = v[1] * expf(s), z_t = v[3] * e;
    const float grown = e * (v[4] + v[3] * more);
    if constexpr (kDivergence) {
      v[5] = fabsf(more) < 0.5f && v[3] > 0
                 ? e * ((v[3] - v[4] + v[5]) * second_order(more) + v[4] * more + v[5] * (1 - more))
                 : z_s - z_t + grown;
    }
    v[0] = top_s, v[1] = z_s, v[2] = top_t, v[3] = z_t, v[4] = grown;
  }
};

// Pixels of a band, and channels of a contiguous level that a block reads: one a warp.
constexpr int kComparedBand = 2048, kComparedPixels = 256, kComparedWarps = 4;

inline int64_t compared_bands(const Level& level) {
  return ceil_div<int64_t>(level.pixels, level.last ? kComparedPixels : kComparedBand);
}

// Blocks for one image of a level.
template <class X>
int64_t compared_blocks(const Level& level) {
  return compared_bands(level) * ceil_div<int64_t>(level.channels, level.last ? kSpan<X> : kComparedWarps);
}

// The read of s and t. A warp goes along a channel of a contiguous level; of a channels_last one the block's warps take pixels in turns,
// kRows at a time, each thread its own channels.
//   parts   (N, bands, numbers, C) of each level, from part[level] on
template <class X, Comparison kKind>
struct ComparedRead {
  using Part = ComparedNumbers<kKind>;
  static constexpr int kThreads = kComparedWarps * kWarp, kResident = 4;
  static constexpr int kCount = kWidth<X>, kColumns = kSpan<X>, kRows = std::is_same_v<X, Any> ? 1 : sizeof(X) == 4 ? 4 : 2;
  struct Shared {
    // Of half of the warps, with a gap after every 32 columns.
    float numbers[kComparedWarps / 2][Part::kCount][kColumns + kColumns / kWarp];
    float pixels[kComparedWarps];
  };

  Places places;
  Memory s[kLevels], t[kLevels];
  int64_t part[kLevels];
  float k;
  float* parts;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks, tile = within % place.blocks;
    const bool aligned = s[level].aligned && t[level].aligned;
    if (place.last) {
      aligned ? read_pixels<true>(me, shared, level, n, tile) : read_pixels<false>(me, shared, level, n, tile);
    } else {
      aligned ? read_channels<true>(me, level, n, tile) : read_channels<false>(me, level, n, tile);
    }
  }

 private:
  template <bool kAligned>
  KD_DEVICE static void get(const Memory& memory, int64_t at, int left, Words<X>& to) {
    Elements<X>::template get<false, kAligned>(memory, memory.begin + at * Elements<X>::bytes(memory), left, to);
  }

  KD_DEVICE void put(const Part& found, int level, int64_t n, int64_t bands, int64_t band, int64_t c) const {
    float* const to = parts + part[level] + (n * bands + band) * Part::kCount * places.place[level].channels + c;
    KD_UNROLL
    for (int i = 0; i < Part::kCount; ++i) to[i * places.place[level].channels] = found.v[i];
  }

  // What a channel's values are taken less.
  KD_DEVICE float origin(const Memory& memory, const Place& place, int64_t c) const {
    return Part::kMoments && c < place.channels ? element_at(memory, place.last ? c : c * place.pixels) : 0.0f;
  }

  template <bool kAligned, class Me>
  KD_DEVICE void read_channels(Me& me, int level, int64_t n, int64_t tile) const {
    const Place& place = places.place[level];
    const int64_t bands = ceil_div<int64_t>(place.pixels, kComparedBand), band = tile % bands;
    const int64_t c = tile / bands * kComparedWarps + me.warp();
    if (c >= place.channels) return;
    const int64_t row = (n * place.channels + c) * place.pixels, begin = band * kComparedBand + me.lane() * kCount;
    const int64_t end = begin - me.lane() * kCount + kComparedBand < place.pixels ? begin - me.lane() * kCount + kComparedBand : place.pixels;
    const float of_s = origin(s[level], place, c), of_t = origin(t[level], place, c);
    Part found = Part::none();
    float pixels = 0;
    for (int64_t p = begin; p < end; p += kColumns) {
      const int left = left_of(end, p);
      Words<X> packed_s, packed_t;
      get<kAligned>(s[level], row + p, left, packed_s);
      get<kAligned>(t[level], row + p, left, packed_t);
      float x[kCount], y[kCount];
      Elements<X>::unpack(s[level], packed_s, x);
      Elements<X>::unpack(t[level], packed_t, y);
      KD_UNROLL
      for (int i = 0; i < kCount; ++i) x[i] -= of_s, y[i] -= of_t;
      const int count = left < kCount ? left : kCount;
      found.add(x, y, count, pixels, k);
      pixels += static_cast<float>(count);
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      Part other;
      KD_UNROLL
      for (int i = 0; i < Part::kCount; ++i) other.v[i] = me.across(found.v[i], mask);
      const float others = me.across(pixels, mask);
      found.join(other, pixels, others, k);
      pixels += others;
    }
    if (me.lane() == 0) put(found, level, n, bands, band, c);
  }

  template <bool kAligned, class Me>
  KD_DEVICE void read_pixels(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = places.place[level];
    const int64_t bands = ceil_div<int64_t>(place.pixels, kComparedPixels), band = tile % bands, begin = band * kComparedPixels;
    const int64_t column = tile / bands * kColumns + me.lane() * kCount;
    const int rows = left_of(place.pixels, begin) < kComparedPixels ? left_of(place.pixels, begin) : kComparedPixels;
    const int left = left_of(place.channels, column);
    const int64_t first = (n * place.pixels + begin) * place.channels + column;
    float of_s[kCount], of_t[kCount];
    Part found[kCount];
    KD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      of_s[i] = origin(s[level], place, column + i), of_t[i] = origin(t[level], place, column + i);
      found[i] = Part::none();
    }
    float pixels = 0;
    for (int row = me.warp() * kRows; row < rows; row += kComparedWarps * kRows) {
      Words<X> packed_s[kRows], packed_t[kRows];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int there = row + r < rows ? left : 0;
        get<kAligned>(s[level], first + (row + r) * place.channels, there, packed_s[r]);
        get<kAligned>(t[level], first + (row + r) * place.channels, there, packed_t[r]);
      }
      const int count = rows - row < kRows ? rows - row : kRows;
      KD_UNROLL
      for (int i = 0; i < kCount; ++i) {
        float x[kRows], y[kRows];
        KD_UNROLL
        for (int r = 0; r < kRows; ++r) {
          x[r] = Elements<X>::one(s[level], packed_s[r], i) - of_s[i];
          y[r] = Elements<X>::one(t[level], packed_t[r], i) - of_t[i];
        }
        found[i].add(x, y, count, pixels, k);
      }
      pixels += static_cast<float>(count);
    }
    // The second half of the warps hands over to the first, and so on.
    const auto at = [&](int i) { return me.lane() * kCount + i + (me.lane() * kCount + i) / kWarp; };
    for (int half = kComparedWarps / 2; half > 0; half /= 2) {
      if (me.warp() >= half && me.warp() < 2 * half) {
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) {
          KD_UNROLL
          for (int j = 0; j < Part::kCount; ++j) shared.numbers[me.warp() - half][j][at(i)] = found[i].v[j];
        }
        if (me.lane() == 0) shared.pixels[me.warp()] = pixels;
      }
      me.sync();
      if (me.warp() < half) {
        const float others = shared.pixels[me.warp() + half];
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) {
          Part other;
          KD_UNROLL
          for (int j = 0; j < Part::kCount; ++j) other.v[j] = shared.numbers[me.warp()][j][at(i)];
          found[i].join(other, pixels, others, k);
        }
        pixels += others;
      }
      me.sync();
    }
    if (me.warp() != 0) return;
    KD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i < left) put(found[i], level, n, bands, band, column + i);
    }
  }
};

// What a read of s and t has left: parts from firsts[level] on.
struct ComparedParts {
  Tensor parts;
  std::vector<int64_t> firsts;
};

template <Comparison kKind>
ComparedParts compared_read(const OnDeviceOf& device, const Tensor& like, const Pyramid& s, const Pyramid& t, float k) {
  std::vector<int64_t> firsts{0};
  for (size_t i = 0; i < s.size(); ++i) {
    firsts.push_back(firsts.back() + s.images() * compared_bands(s[i]) * ComparedNumbers<kKind>::kCount * s[i].channels);
  }
  const Tensor parts = new_floats(like, {firsts.back()});
  if (s.images() > 0) {
    by_type({&s, &t}, [&](auto type) {
      using X = decltype(type);
      ComparedRead<X, kKind> pass{};
      pass.k = k, pass.parts = floats(parts);
      in_launches(s, compared_blocks<X>, [&](const Places& places) {
        pass.places = places;
        for (int i = 0; i < places.count; ++i) {
          const int level = places.place[i].index;
          pass.s[i] = memory_of(s[level]), pass.t[i] = memory_of(t[level]), pass.part[i] = firsts[level];
        }
        device.launch(pass, places.blocks());
      });
    });
  }
  return {parts, firsts};
}

}  // namespace kd
