// The read pass: every sum over channels and over pixels that a loss takes of a pyramid, from one read of it.
#pragma once

#include <type_traits>

#include "launch.h"
#include "levels.h"
#include "sums.h"

namespace kd {

enum class ChannelSums { none, of_values, of_magnitudes };

// What a read pass is to make. Maps are packed (N, P) level after level, vectors packed (N, C); a null pointer is not wanted.
//   raw       sum_c weights * x, of |x| with `absolute`
//   magnitude sum_c |x|
//   error     sum_c error_channel * (x - target)^2;   error_channel null is 1
//   channel   sums over the pixels of |x| or x, by `sums`, divided by the number of pixels with `mean`
struct Reading {
  const Pyramid* target = nullptr;
  const float* weights = nullptr;
  const float* error_channel = nullptr;
  bool absolute = false;
  ChannelSums sums = ChannelSums::none;
  bool mean = false;
  float* raw = nullptr;
  float* magnitude = nullptr;
  float* error = nullptr;
  float* channel = nullptr;
};

void reduce(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Reading& wanted);

// Pixels of a channels_last level that a block reads, all channels of each.
constexpr int kBand = 128;

// Blocks for one image of a level.
template <class X>
int64_t read_blocks(const Level& level) {
  return ceil_div<int64_t>(level.pixels, level.last ? kBand : kSpan<X>);
}

// A block's share of the read pass: kSpan pixels of all channels of a contiguous level, kBand pixels of a channels_last one. Its warps
// take the rows in turns, four at a time: of the sums down the rows every thread has its own columns', those across a row are the warp's.
//
// x, target  levels of type X, the target's read with kError; kOnce: nobody reads x again soon;   parts: (N, blocks, C) of each level, a block's channel sums
template <class X, bool kError, bool kOnce = false>
struct Reduce {
  static constexpr int kThreads = 256, kResident = kError || std::is_same_v<X, Any> ? 2 : 3;
  static constexpr int kWarps = kThreads / kWarp, kRows = 4;
  static constexpr int kCount = kWidth<X>, kColumns = kSpan<X>;
  struct Shared {
    // With a gap after every 32 columns: what a thread has lies in another bank than what any other one of its warp has.
    float down[kWarps][kColumns + kColumns / kWarp];
    // Of the pixels of a channels_last level, each of which one thread adds to: raw, magnitude and error.
    float across[3][kBand];
  };

  Places places;
  Memory x[kLevels], target[kLevels];
  int64_t part[kLevels];
  const float *weights, *error_channel;
  float *raw, *magnitude, *error, *parts;
  bool absolute, of_magnitudes;

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
    if (places.place[level].last) {
      read_pixels(me, shared, level, n, tile);
    } else {
      read_channels(me, shared, level, n, tile);
    }
  }

 private:
  KD_DEVICE static const char* row_of(const Memory& memory, const Place& place, int64_t n, int64_t row, int64_t column, int64_t length) {
    return memory.begin + (n * place.channels * place.pixels + row * length + column) * Elements<X>::bytes(memory);
  }

  // What the warp reads at once: of wide words fewer rows, for which there are registers.
  static constexpr int kAtOnce = kError && Words<X>::kWords > 4 ? 1 : kError || Words<X>::kWords > 4 ? 2 : kRows;
  struct Rows {
    Words<X> x[kAtOnce], target[kError ? kAtOnce : 1];
  };

  // Rows first, first + 1, ... of those below `end`; the others are zeros.
  KD_DEVICE void get(Rows& rows, int level, int64_t n, int64_t first, int64_t end, int64_t column, int64_t length) const {
    const Place& place = places.place[level];
    KD_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t left = first + r < end ? length - column : 0;
      Elements<X>::template get<kOnce>(x[level], row_of(x[level], place, n, first + r, column, length), left, rows.x[r]);
      if (!kError) continue;
      Elements<X>::get(target[level], row_of(target[level], place, n, first + r, column, length), left, rows.target[kError ? r : 0]);
    }
  }

  KD_DEVICE void unpack(const Rows& rows, int level, int r, float (&value)[kCount], float (&goal)[kCount]) const {
    Elements<X>::unpack(x[level], rows.x[r], value);
    if (kError) Elements<X>::unpack(target[level], rows.target[kError ? r : 0], goal);
  }

  KD_DEVICE float channel_sum_of(float value) const { return of_magnitudes ? fabsf(value) : value; }

  template <class Me>
  KD_DEVICE void read_channels(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = places.place[level];
    const int64_t column = tile * kColumns + me.lane() * kCount, vector = place.vector + n * place.channels;
    float raw_sum[kCount] = {}, magnitude_sum[kCount] = {}, error_sum[kCount] = {};
    for (int64_t first = me.warp() * kRows; first < place.channels; first += kWarps * kRows) {
      Rows rows;
      float across[kRows];
      KD_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r % kAtOnce == 0) get(rows, level, n, first + r, place.channels, column, place.pixels);
        const bool there = first + r < place.channels;
        const float weight = raw != nullptr && there ? weights[vector + first + r] : 0.0f;
        const float error_weight = error_channel != nullptr && there ? error_channel[vector + first + r] : 1.0f;
        across[r] = 0;
        float value[kCount], goal[kCount];
        unpack(rows, level, r % kAtOnce, value, goal);
        KD_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const float size = fabsf(value[i]);
          if (raw != nullptr && there) raw_sum[i] += weight * (absolute ? size : value[i]);
          magnitude_sum[i] += size;
          if (kError) {
            const float difference = value[i] - goal[i];
            error_sum[i] += error_weight * difference * difference;
          }
          across[r] += channel_sum_of(value[i]);
        }
      }
      if (parts != nullptr) {
        const float total = warp_sums(me, across);
        const int64_t channel = first + me.lane() / 8;
        if (me.lane() % 8 == 0 && channel < place.channels) {
          parts[part[level] + (n * place.blocks + tile) * place.channels + channel] = total;
        }
      }
    }
    const int64_t map = place.map + n * place.pixels + tile * kColumns, left = place.pixels - tile * kColumns;
    if (raw != nullptr) add_up(me, shared, raw_sum, raw + map, left);
    if (magnitude != nullptr) add_up(me, shared, magnitude_sum, magnitude + map, left);
    if (kError) add_up(me, shared, error_sum, error + map, left);
  }

  template <class Me>
  KD_DEVICE void read_pixels(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = places.place[level];
    const int64_t vector = place.vector + n * place.channels;
    const int64_t begin = tile * kBand, end = begin + kBand < place.pixels ? begin + kBand : place.pixels;
    for (int64_t base = 0; base < place.channels; base += kColumns) {
      const int64_t column = base + me.lane() * kCount;
      float weight[kCount], error_weight[kCount], down[kCount] = {};
      KD_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const bool there = column + i < place.channels;
        weight[i] = raw != nullptr && there ? weights[vector + column + i] : 0.0f;
        error_weight[i] = error_channel != nullptr && there ? error_channel[vector + column + i] : 1.0f;
      }
      for (int row = me.warp() * kRows; row < kBand; row += kWarps * kRows) {
        Rows rows;
        float of_raw[kRows], of_magnitude[kRows], of_error[kRows];
        KD_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (r % kAtOnce == 0) get(rows, level, n, begin + row + r, end, column, place.channels);
          of_raw[r] = of_magnitude[r] = of_error[r] = 0;
          float value[kCount], goal[kCount];
          unpack(rows, level, r % kAtOnce, value, goal);
          KD_UNROLL
          for (int i = 0; i < kCount; ++i) {
            const float size = fabsf(value[i]);
            // What is not there has no weight: not even infinity times the 0 that was read.
            if (column + i < place.channels) of_raw[r] += weight[i] * (absolute ? size : value[i]);
            of_magnitude[r] += size;
            if (kError) {
              const float difference = value[i] - goal[i];
              of_error[r] += error_weight[i] * difference * difference;
            }
            down[i] += channel_sum_of(value[i]);
          }
        }
        if (raw != nullptr) add_across(me, shared.across[0], row, of_raw, base == 0);
        if (magnitude != nullptr) add_across(me, shared.across[1], row, of_magnitude, base == 0);
        if (kError) add_across(me, shared.across[2], row, of_error, base == 0);
      }
      if (parts != nullptr) {
        add_up(me, shared, down, parts + part[level] + (n * place.blocks + tile) * place.channels + base, place.channels - base);
      }
    }
    me.sync();
    const int row = me.index();
    if (begin + row < end) {
      const int64_t map = place.map + n * place.pixels + begin + row;
      if (raw != nullptr) raw[map] = shared.across[0][row];
      if (magnitude != nullptr) magnitude[map] = shared.across[1][row];
      if (kError) error[map] = shared.across[2][row];
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
