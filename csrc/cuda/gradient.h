// The write pass: a pyramid's gradient, from vectors per channel and per pixel and one more read of the pyramid.
#pragma once

#include <type_traits>

#include "launch.h"
#include "levels.h"
#include "sums.h"

namespace kd {

// A packed vector (N, C) and a packed map (N, P) of which a term's factor is made; null for the neutral value.
struct Factors {
  const float *channel, *pixel;
  bool there;
};

// dx = product_c * product_p * (sgn(x) if absolute else 1) + sgn(x) * (sign_c + sign_p) + error_c * error_p * (x - target) + arriving
// A term that is not there contributes nothing; the neutral value is 1, of the sign's factors 0.
//   mean    the product is divided by the number of pixels
//   values  (L, N), filled with the sum of error_c * error_p * (x - target)^2 / 2, of which the error's part is the gradient; or null
//   unless  on the device: not 0 if `out` is right already, and is to stay as it is; or null
struct Writing {
  const Pyramid* target = nullptr;
  const Pyramid* arriving = nullptr;
  Factors product{}, sign{}, error{};
  bool absolute = false, mean = false;
  float* values = nullptr;
  const int* unless = nullptr;
};

void gradient(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out);

// Rows of a block: channels of a contiguous level, pixels of a channels_last one.
constexpr int kRowsOfBlock = 64;

// Blocks for one image of a level.
template <class X>
int64_t write_blocks(const Level& level) {
  const int64_t length = level.last ? level.channels : level.pixels, height = level.last ? level.pixels : level.channels;
  return ceil_div<int64_t>(length, kSpan<X>) * ceil_div<int64_t>(height, kRowsOfBlock);
}

// The factors that belong to a channel or to a pixel.
struct Numbers {
  float product, sign, error;
};

// A block's share of the write pass: kSpan columns of some rows, which its warps take in turns. The numbers that belong to a thread's
// columns stay in its registers.
//
// x, target, arriving, out  levels of type X, those that arrive with kArriving;   parts: a number a block, its sum of squared errors, or null
template <class X, bool kArriving>
struct Gradient {
  static constexpr int kThreads = 256, kResident = 2, kWarps = kThreads / kWarp, kRows = std::is_same_v<X, Any> ? 1 : 2;
  static constexpr int kCount = kWidth<X>, kColumns = kSpan<X>;
  struct Shared {
    float of_warp[kWarps];
  };

  Places places;
  Memory x[kLevels], target[kLevels], arriving[kLevels], out[kLevels];
  Factors product, sign, error;
  float* parts;
  const int* unless;
  bool absolute, mean, reads;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    if (unless != nullptr && *unless != 0) return;
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks;
    const int64_t map = place.map + n * place.pixels;
    const float squares = write(me, level, n, within % place.blocks, [&](int64_t pixel) {
      Numbers found = {1, 0, 1};
      if (product.pixel != nullptr) found.product = product.pixel[map + pixel];
      if (sign.pixel != nullptr) found.sign = sign.pixel[map + pixel];
      if (error.pixel != nullptr) found.error = error.pixel[map + pixel];
      return found;
    });
    if (parts == nullptr) return;
    const float total = block_sum(me, squares, shared.of_warp, kWarps);
    if (me.index() == 0) parts[me.block()] = total;
  }

  // One tile of an image; returns the thread's share of the sum of squared errors. of_pixel: (pixel) -> Numbers
  template <class Me, class OfPixel>
  KD_DEVICE float write(Me& me, int level, int64_t n, int64_t tile, const OfPixel& of_pixel) const {
    const Place& place = places.place[level];
    const int64_t length = place.last ? place.channels : place.pixels, height = place.last ? place.pixels : place.channels;
    const int64_t across = ceil_div<int64_t>(length, kColumns);
    const int64_t column = tile % across * kColumns + me.lane() * kCount;
    const int64_t begin = tile / across * kRowsOfBlock;
    const int64_t end = begin + kRowsOfBlock < height ? begin + kRowsOfBlock : height;
    Numbers columns[kCount];
    KD_UNROLL
    for (int i = 0; i < kCount; ++i) {
      columns[i] = {0, 0, 0};
      if (column + i < length) columns[i] = place.last ? of_channel(place, n, column + i) : of_pixel(column + i);
    }
    float squares = 0;
    for (int64_t first = begin + me.warp() * kRows; first < end; first += kWarps * kRows) {
      Words<X> read[kRows], goal[kRows], add[kArriving ? kRows : 1];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int64_t left = first + r < end ? length - column : 0;
        const int64_t at = n * place.channels * place.pixels + (first + r) * length + column;
        if (reads) get(x[level], at, left, read[r]);
        if (error.there) get(target[level], at, left, goal[r]);
        if (kArriving) get(arriving[level], at, left, add[kArriving ? r : 0]);
      }
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // The same for the whole warp, which stores together.
        if (first + r >= end) continue;
        const Numbers row = place.last ? of_pixel(first + r) : of_channel(place, n, first + r);
        float made[kCount], value[kCount] = {}, wanted[kCount], arrived[kCount];
        if (reads) Elements<X>::unpack(x[level], read[r], value);
        if (error.there) Elements<X>::unpack(target[level], goal[r], wanted);
        if (kArriving) Elements<X>::unpack(arriving[level], add[kArriving ? r : 0], arrived);
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const float sign_of = kd::sign(value[i]);
          made[i] = 0;
          if (product.there) made[i] += row.product * columns[i].product * (absolute ? sign_of : 1.0f);
          if (sign.there) made[i] += sign_of * (row.sign + columns[i].sign);
          if (error.there) {
            const float difference = value[i] - wanted[i];
            const float slope = row.error * columns[i].error * difference;
            made[i] += slope;
            if (column + i < length) squares += slope * difference;
          }
          if (kArriving) made[i] += arrived[i];
        }
        const int64_t at = n * place.channels * place.pixels + (first + r) * length + column;
        const Memory& to = out[level];
        Elements<X>::put(me, to, const_cast<char*>(to.begin) + at * Elements<X>::bytes(to), length - column, made);
      }
    }
    return squares;
  }

 private:
  KD_DEVICE static void get(const Memory& memory, int64_t at, int64_t left, Words<X>& to) {
    Elements<X>::get(memory, memory.begin + at * Elements<X>::bytes(memory), left, to);
  }

  KD_DEVICE Numbers of_channel(const Place& place, int64_t n, int64_t channel) const {
    const int64_t at = place.vector + n * place.channels + channel;
    Numbers found = {1, 0, 1};
    if (product.channel != nullptr) found.product = product.channel[at];
    if (sign.channel != nullptr) found.sign = sign.channel[at];
    if (error.channel != nullptr) found.error = error.channel[at];
    if (mean) found.product /= static_cast<float>(place.pixels);
    return found;
  }
};

// Of each level and image half the sum of what its blocks left.
struct SumSquares {
  static constexpr int kThreads = 128, kResident = 4, kWarps = kThreads / kWarp;
  struct Shared {
    float of_warp[kWarps];
  };

  // Those of the write pass.
  Places places;
  const float* parts;
  float* values;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const Place& place = places.place[me.block() / places.images];
    const int64_t n = me.block() % places.images;
    const float* mine = parts + place.first + n * place.blocks;
    float total = 0;
    for (int64_t i = me.index(); i < place.blocks; i += kThreads) total += mine[i];
    total = block_sum(me, total, shared.of_warp, kWarps);
    if (me.index() == 0) values[place.index * places.images + n] = 0.5f * total;
  }
};

}  // namespace kd
