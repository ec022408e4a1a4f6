// The read pass: every sum over channels and over pixels that a loss takes of a pyramid, from one read of it.
#pragma once

#include <type_traits>

#include "../include/reading.h"
#include "launch.h"
#include "levels.h"
#include "sums.h"

namespace kd {

// mean: the channel sums are divided by the number of pixels
void reduce(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted, bool mean = false);

// Pixels of a channels_last level that a block reads, all channels of each.
constexpr int kBand = 128;

// Blocks for one image of a level.
template <class X>
int64_t read_blocks(const Level& level) {
  return ceil_div<int64_t>(level.pixels, level.last ? kBand : kSpan<X>);
}

// What a read pass makes, as it is known when it is compiled. What is not wanted after all has a null pointer.
// kWeightedSums: value sums with a weight a pixel.
enum Sums : unsigned { kRaw = 1, kMagnitude = 2, kError = 4, kValueSums = 8, kMagnitudeSums = 16, kOfMagnitudes = 32, kWeightedSums = 64 };

// A block's share of the read pass: kSpan pixels of all channels of a contiguous level, kBand pixels of a channels_last one. Its warps
// take the rows in turns, four at a time: of the sums down the rows every thread has its own columns', those across a row are the warp's.
//
// kMade      of Sums; kOfMagnitudes: raw is made of |x|;   kOnce: nobody reads x again soon
// x, target  levels of type X, the target's read for the error;   parts: (N, blocks, C) of each level, a block's channel sums
template <class X, unsigned kMade, bool kOnce = false>
struct Reduce {
  static constexpr bool kRaws = kMade & kRaw, kMagnitudes = kMade & kMagnitude, kErrors = kMade & kError;
  static constexpr bool kSums = kMade & (kValueSums | kMagnitudeSums | kWeightedSums), kWeighted = kMade & kWeightedSums;
  static constexpr bool kWide = std::is_same_v<X, Any>;
  static constexpr int kThreads = 256, kResident = kErrors || kWide ? 2 : 3;
  static constexpr int kWarps = kThreads / kWarp, kRows = 4;
  // Rows that are on their way at the same time: of wide words fewer, for which there are registers.
  static constexpr int kAtOnce = kErrors && kWide ? 1 : kErrors || kWide ? 2 : kRows;
  static constexpr int kCount = kWidth<X>, kColumns = kSpan<X>;
  struct Shared {
    // With a gap after every 32 columns: what a thread has lies in another bank than what any other one of its warp has.
    float down[kWarps][kColumns + kColumns / kWarp];
    // Of the pixels of a channels_last level, each of which one thread adds to: raw, magnitude and error.
    float across[3][kBand];
  };

  Places places;
  Memory x[kLevels], target[kErrors ? kLevels : 1];
  int64_t part[kLevels];
  const float *weights, *error_channel, *pixel_weights;
  float *raw, *magnitude, *error, *parts;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first;
    read(me, shared, level, within / place.blocks, within % place.blocks);
  }

  // One tile of an image.
  template <class Me>
  KD_DEVICE void read(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const bool aligned = x[level].aligned && (!kErrors || target[kErrors ? level : 0].aligned);
    if (places.place[level].last) {
      aligned ? read_pixels<true>(me, shared, level, n, tile) : read_pixels<false>(me, shared, level, n, tile);
    } else {
      aligned ? read_channels<true>(me, shared, level, n, tile) : read_channels<false>(me, shared, level, n, tile);
    }
  }

 private:
  // A thread's elements in a row of a level and of its target, and what lies between rows.
  struct Cursor {
    const Memory *x, *target;
    const char *at, *target_at;
    int64_t row, target_row;
    int left;

    KD_DEVICE void go(int64_t rows) {
      at += rows * row;
      if (kErrors) target_at += rows * target_row;
    }
  };

  KD_DEVICE Cursor cursor(int level, int64_t n, int64_t row, int64_t column, int64_t length) const {
    const Place& place = places.place[level];
    const int64_t first = n * place.channels * place.pixels + row * length + column;
    const Memory& of_target = target[kErrors ? level : 0];
    const int64_t bytes = Elements<X>::bytes(x[level]), of_bytes = kErrors ? Elements<X>::bytes(of_target) : 0;
    return {&x[level],      &of_target,         x[level].begin + first * bytes, kErrors ? of_target.begin + first * of_bytes : nullptr,
            length * bytes, length * of_bytes, left_of(length, column)};
  }

  struct Rows {
    Words<X> x[kAtOnce], target[kErrors ? kAtOnce : 1];
  };

  // kAtOnce rows from the first of four, of which `count` are there; the others are zeros.
  template <bool kAligned>
  KD_DEVICE static void get(Rows& rows, const Cursor& from, int first, int count) {
    KD_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      const int left = first + r < count ? from.left : 0;
      Elements<X>::template get<kOnce, kAligned>(*from.x, from.at + (first + r) * from.row, left, rows.x[r]);
      if (!kErrors) continue;
      Elements<X>::template get<false, kAligned>(*from.target, from.target_at + (first + r) * from.target_row, left,
                                                 rows.target[kErrors ? r : 0]);
    }
  }

  KD_DEVICE static void unpack(const Rows& rows, const Cursor& from, int r, float (&value)[kCount], float (&goal)[kCount]) {
    Elements<X>::unpack(*from.x, rows.x[r], value);
    if (kErrors) Elements<X>::unpack(*from.target, rows.target[kErrors ? r : 0], goal);
  }

  template <bool kAligned, class Me>
  KD_DEVICE void read_channels(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = places.place[level];
    const int64_t vector = place.vector + n * place.channels;
    const int channels = static_cast<int>(place.channels);
    const int64_t map = place.map + n * place.pixels + tile * kColumns, left = place.pixels - tile * kColumns;
    float raw_sum[kCount] = {}, magnitude_sum[kCount] = {}, error_sum[kCount] = {}, pixel_weight[kWeighted ? kCount : 1];
    KD_UNROLL
    for (int i = 0; i < kCount && kWeighted; ++i) {
      const int column = me.lane() * kCount + i;
      pixel_weight[kWeighted ? i : 0] = column < left ? pixel_weights[map + column] : 0.0f;
    }
    int first = me.warp() * kRows;
    Cursor from = cursor(level, n, first, tile * kColumns + me.lane() * kCount, place.pixels);
    for (; first < channels; first += kWarps * kRows, from.go(kWarps * kRows)) {
      Rows rows;
      float across[kRows];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r % kAtOnce == 0) get<kAligned>(rows, from, r, channels - first);
        // Rows that are not there are zeros, and need no weight.
        const bool there = first + r < channels;
        const float weight = kRaws && raw != nullptr && there ? weights[vector + first + r] : 0.0f;
        const float error_weight = kErrors && error_channel != nullptr && there ? error_channel[vector + first + r] : 1.0f;
        across[r] = 0;
        float value[kCount], goal[kCount];
        unpack(rows, from, r % kAtOnce, value, goal);
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const float size = fabsf(value[i]);
          if (kRaws) raw_sum[i] += weight * (kMade & kOfMagnitudes ? size : value[i]);
          if (kMagnitudes) magnitude_sum[i] += size;
          if (kErrors) {
            const float difference = value[i] - goal[i];
            error_sum[i] += error_weight * difference * difference;
          }
          if (kSums) across[r] += (kMade & kMagnitudeSums ? size : value[i]) * (kWeighted ? pixel_weight[kWeighted ? i : 0] : 1.0f);
        }
      }
      if (!kSums || parts == nullptr) continue;
      const float total = warp_sums(me, across);
      const int channel = first + me.lane() / 8;
      if (me.lane() % 8 == 0 && channel < channels) {
        parts[part[level] + (n * place.blocks + tile) * place.channels + channel] = total;
      }
    }
    if (kRaws && raw != nullptr) add_up(me, shared, raw_sum, raw + map, left);
    if (kMagnitudes && magnitude != nullptr) add_up(me, shared, magnitude_sum, magnitude + map, left);
    if (kErrors) add_up(me, shared, error_sum, error + map, left);
  }

  template <bool kAligned, class Me>
  KD_DEVICE void read_pixels(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = places.place[level];
    const int64_t vector = place.vector + n * place.channels;
    const int64_t begin = tile * kBand;
    const int count = static_cast<int>(begin + kBand < place.pixels ? kBand : place.pixels - begin);
    for (int64_t base = 0; base < place.channels; base += kColumns) {
      const int64_t column = base + me.lane() * kCount;
      float weight[kCount], error_weight[kCount], down[kCount] = {};
      KD_UNROLL
      for (int i = 0; i < kCount; ++i) {
        // Elements that are not there are zeros, and need no weight.
        const bool there = column + i < place.channels;
        weight[i] = kRaws && raw != nullptr && there ? weights[vector + column + i] : 0.0f;
        error_weight[i] = kErrors && error_channel != nullptr && there ? error_channel[vector + column + i] : 1.0f;
      }
      int row = me.warp() * kRows;
      Cursor from = cursor(level, n, begin + row, column, place.channels);
      for (; row < kBand; row += kWarps * kRows, from.go(kWarps * kRows)) {
        Rows rows;
        float of_raw[kRows], of_magnitude[kRows], of_error[kRows];
        KD_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (r % kAtOnce == 0) get<kAligned>(rows, from, r, count - row);
          of_raw[r] = of_magnitude[r] = of_error[r] = 0;
          const float pixel_weight = kWeighted && row + r < count ? pixel_weights[place.map + n * place.pixels + begin + row + r] : 1.0f;
          float value[kCount], goal[kCount];
          unpack(rows, from, r % kAtOnce, value, goal);
          KD_UNROLL
          for (int i = 0; i < kCount; ++i) {
            const float size = fabsf(value[i]);
            if (kRaws) of_raw[r] += weight[i] * (kMade & kOfMagnitudes ? size : value[i]);
            if (kMagnitudes) of_magnitude[r] += size;
            if (kErrors) {
              const float difference = value[i] - goal[i];
              of_error[r] += error_weight[i] * difference * difference;
            }
            if (kSums) down[i] += (kMade & kMagnitudeSums ? size : value[i]) * pixel_weight;
          }
        }
        if (kRaws && raw != nullptr) add_across(me, shared.across[0], row, of_raw, base == 0);
        if (kMagnitudes && magnitude != nullptr) add_across(me, shared.across[1], row, of_magnitude, base == 0);
        if (kErrors) add_across(me, shared.across[2], row, of_error, base == 0);
      }
      if (kSums && parts != nullptr) {
        add_up(me, shared, down, parts + part[level] + (n * place.blocks + tile) * place.channels + base, place.channels - base);
      }
    }
    me.sync();
    const int row = me.index();
    if (row < count) {
      const int64_t map = place.map + n * place.pixels + begin + row;
      if (kRaws && raw != nullptr) raw[map] = shared.across[0][row];
      if (kMagnitudes && magnitude != nullptr) magnitude[map] = shared.across[1][row];
      if (kErrors) error[map] = shared.across[2][row];
    }
    me.sync();
  }

  // The sums of the warp's rows, added to what their other channels gave.
  template <class Me>
  KD_DEVICE static void add_across(Me& me, float* sums, int row, const float (&mine)[kRows], bool first) {
    const float total = warp_sums(me, mine);
    if (me.lane() % 8 == 0) sums[row + me.lane() / 8] = first ? total : sums[row + me.lane() / 8] + total;
  }

  // The warps' sums down their rows, added up: out[i] of the block's columns, of which `left` are there.
  template <class Me>
  KD_DEVICE void add_up(Me& me, Shared& shared, const float (&mine)[kCount], float* out, int64_t left) const {
    const auto at = [](int column) { return column + column / kWarp; };
    KD_UNROLL
    for (int i = 0; i < kCount; ++i) shared.down[me.warp()][at(me.lane() * kCount + i)] = mine[i];
    me.sync();
    const int column = me.index();
    if (column < kColumns && column < left) {
      float total = shared.down[0][at(column)];
      KD_UNROLL
      for (int warp = 1; warp < kWarps; ++warp) total += shared.down[warp][at(column)];
      out[column] = total;
    }
    me.sync();
  }
};

// The blocks' channel sums of each image added up: 32 channels of it by a block.
struct SumParts {
  static constexpr int kThreads = 256, kResident = 4, kWarps = kThreads / kWarp;
  struct Shared {
    float sums[kWarps][kWarp];
  };

  Places places;
  // Of each level where its parts begin, and how many an image has.
  int64_t part[kLevels], count[kLevels];
  const float* parts;
  float* channel;
  bool mean;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const int level = places.of(me.block());
    const Place& place = places.place[level];
    const int64_t within = me.block() - place.first, n = within / place.blocks;
    const int64_t c = within % place.blocks * kWarp + me.lane();
    const float* from = parts + part[level] + n * count[level] * place.channels + c;
    // Two sums, so that the additions need not wait for each other.
    float even = 0, odd = 0;
    if (c < place.channels) {
      int64_t i = me.warp();
      for (; i + kWarps < count[level]; i += 2 * kWarps) {
        even += from[i * place.channels];
        odd += from[(i + kWarps) * place.channels];
      }
      if (i < count[level]) even += from[i * place.channels];
    }
    shared.sums[me.warp()][me.lane()] = even + odd;
    me.sync();
    if (me.warp() != 0 || c >= place.channels) return;
    float total = shared.sums[0][me.lane()];
    KD_UNROLL
    for (int warp = 1; warp < kWarps; ++warp) total += shared.sums[warp][me.lane()];
    channel[place.vector + n * place.channels + c] = mean ? total / static_cast<float>(place.pixels) : total;
  }
};

}  // namespace kd
