// The write pass of `channel_kl` and `correlation`: the gradient of s from some numbers of each channel and one more read of s and t.
#pragma once

#include <type_traits>

#include "launch.h"
#include "levels.h"

namespace kd {

// Rows of a block: channels of a contiguous level, pixels of a channels_last one.
constexpr int kComparedRows = 128;

// Blocks for one image of a level.
template <class X>
int64_t compared_write_blocks(const Level& level) {
  const int64_t length = level.last ? level.channels : level.pixels, height = level.last ? level.pixels : level.channels;
  return ceil_div<int64_t>(length, kSpan<X>) * ceil_div<int64_t>(height, kComparedRows);
}

// ds = by * (u exp((s - a) k) - v exp((t - b) k)) or, of the correlation, by * (u (s - a) + v (t - b) + w), by blocks of kSpan columns of
// some rows, which its warps take in turns.
//   planes, apart  a, u, b, v and w of all channels, `apart` numbers from one to the next: of the correlation packed (C,) level after level,
//                  otherwise packed (N, C)
//   grad, shares   (L, N): `by` is k times a row's gradient; of the correlation the sum over the images of the gradient times the image's
//                  share of `shares`, an equal one where these are all 0
template <class X, bool kCorrelation>
struct ComparedWrite {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = std::is_same_v<X, Any> ? 1 : 2, kPlanes = kCorrelation ? 5 : 4;
  static constexpr int kResident = 2, kCount = kWidth<X>, kColumns = kSpan<X>;
  // With a gap after every eight columns, so that a warp's threads read from different banks.
  static constexpr int kPlaces = kColumns + kColumns / 8 > kComparedRows ? kColumns + kColumns / 8 : kComparedRows;
  struct Shared {
    float planes[kPlanes][kPlaces];
  };

  Places places;
  Memory s[kLevels], t[kLevels], out[kLevels];
  const float *planes, *grad, *shares;
  int64_t apart;
  float k;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks, tile = within % place.blocks;
    const int64_t length = place.last ? place.channels : place.pixels, height = place.last ? place.pixels : place.channels;
    const int64_t across = ceil_div<int64_t>(length, kColumns), first = tile % across * kColumns, begin = tile / across * kComparedRows;
    const int rows = static_cast<int>(begin + kComparedRows < height ? kComparedRows : height - begin);
    const int64_t channel = place.last ? first : begin;
    const float* const from = planes + (kCorrelation ? place.vector / places.images : place.vector + n * place.channels) + channel;
    const float by = factor(place.index, n);
    for (int i = me.index(); i < (place.last ? kColumns : kComparedRows); i += kThreads) {
      const bool there = channel + i < place.channels;
      KD_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const float number = there ? from[plane * apart + i] : 0.0f;
        // The origins as they are.
        shared.planes[plane][place.last ? i + i / 8 : i] = plane == 0 || plane == 2 ? number : number * by;
      }
    }
    me.sync();
    const int64_t at = n * place.channels * place.pixels + begin * length + first;
    const int left = left_of(length, first) - me.lane() * kCount;
    const bool aligned = s[level].aligned && t[level].aligned && out[level].aligned;
    if (place.last) {
      aligned ? write<true, true>(me, shared, level, at, rows, length, left) : write<false, true>(me, shared, level, at, rows, length, left);
    } else {
      aligned ? write<true, false>(me, shared, level, at, rows, length, left) : write<false, false>(me, shared, level, at, rows, length, left);
    }
  }

 private:
  KD_DEVICE float factor(int64_t index, int64_t n) const {
    if (!kCorrelation) return grad[index * places.images + n] * k;
    float total = 0, weighted = 0, plain = 0;
    for (int64_t i = index * places.images; i < (index + 1) * places.images; ++i) {
      total += shares[i];
      weighted += grad[i] * shares[i];
      plain += grad[i];
    }
    return total == 0 ? plain / static_cast<float>(places.images) : weighted / total;
  }

  template <bool kAligned>
  KD_DEVICE static void get(const Memory& memory, int64_t at, int left, Words<X>& to) {
    Elements<X>::template get<true, kAligned>(memory, memory.begin + at * Elements<X>::bytes(memory), left, to);
  }

  KD_DEVICE float slope(float s, float t, const float (&plane)[kPlanes]) const {
    if constexpr (kCorrelation) return plane[1] * (s - plane[0]) + plane[3] * (t - plane[2]) + plane[4];
    return plane[1] * expf((s - plane[0]) * k) - plane[3] * expf((t - plane[2]) * k);
  }

  // at: the tile's first element;   left: of a row from the thread's elements on
  template <bool kAligned, bool kLast, class Me>
  KD_DEVICE void write(Me& me, const Shared& shared, int level, int64_t at, int rows, int64_t length, int left) const {
    const int column = me.lane() * kCount;
    at += me.warp() * kRows * length + column;
    float plane[kLast ? kCount : 1][kPlanes];
    if constexpr (kLast) {
      KD_UNROLL
      for (int i = 0; i < kCount; ++i) {
        KD_UNROLL
        for (int j = 0; j < kPlanes; ++j) plane[i][j] = shared.planes[j][column + i + (column + i) / 8];
      }
    }
    for (int row = me.warp() * kRows; row < rows; row += kWarps * kRows, at += kWarps * kRows * length) {
      Words<X> read_s[kRows], read_t[kRows];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int there = row + r < rows ? left : 0;
        get<kAligned>(s[level], at + r * length, there, read_s[r]);
        get<kAligned>(t[level], at + r * length, there, read_t[r]);
      }
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // The same for the whole warp, which stores together.
        if (row + r >= rows) continue;
        if constexpr (!kLast) {
          KD_UNROLL
          for (int j = 0; j < kPlanes; ++j) plane[0][j] = shared.planes[j][row + r];
        }
        float x[kCount], y[kCount], made[kCount];
        Elements<X>::unpack(s[level], read_s[r], x);
        Elements<X>::unpack(t[level], read_t[r], y);
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) made[i] = slope(x[i], y[i], plane[kLast ? i : 0]);
        const Memory& to = out[level];
        char* const place = const_cast<char*>(to.begin) + (at + r * length) * Elements<X>::bytes(to);
        Elements<X>::template put<kAligned>(me, to, place, left, made);
      }
    }
  }
};

template <bool kCorrelation>
void compared_write(const OnDeviceOf& device, const Pyramid& s, const Pyramid& t, const float* planes, int64_t apart, const float* grad,
                    const float* shares, float k, const Results& out) {
  if (s.images() == 0) return;
  by_type({&s, &t}, [&](auto type) {
    using X = decltype(type);
    ComparedWrite<X, kCorrelation> pass{};
    pass.planes = planes, pass.grad = grad, pass.shares = shares, pass.apart = apart, pass.k = k;
    in_launches(s, compared_write_blocks<X>, [&](const Places& places) {
      pass.places = places;
      for (int i = 0; i < places.count; ++i) {
        const int level = places.place[i].index;
        pass.s[i] = memory_of(s[level]), pass.t[i] = memory_of(t[level]), pass.out[i] = memory_of(out[level]);
      }
      device.launch(pass, places.blocks());
    });
  });
}

}  // namespace kd
