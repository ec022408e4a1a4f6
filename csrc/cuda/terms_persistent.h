// GKD's map and BMFI of a whole pyramid in one launch that stays on the GPU: the tiles of four stages in one queue, so that one image's
// gradient is written while the next image is read for the first time, and the second read of an image comes from the L2 cache.
//
// An item is one level of one image. Of an item the stages are, each when all tiles of the one before it are done:
//   weights   reads the gradients of student and teacher once: their channel means
//   sums      reads the features of both: maps, channel sums, and by tile what the statistics of the maps are made of
//   compare   goes over the maps: distances and what their gradients need
//   write     reads the features again, from the cache, and writes the gradient
// The block that ends a stage of an item brings together what its tiles have left, in the tiles' order. Tickets are taken in the queue's
// order, so that what a block waits for is always in another block's hands: nothing depends on how many blocks there are, and no value on
// which of them makes it.
#pragma once

#include "gradient.h"
#include "maps.h"
#include "reduce.h"

namespace kd {

// Pixels of a tile of the stage that compares.
constexpr int64_t kCompared = 2048;
// Rows of the result: the map's, the attention's over pixels and over channels, the imitation's.
constexpr int kPersistentRows = 4;

enum class Stage { weights, sums, compare, write };
constexpr int kStages = 4;

// The tiles of one stage of one level in a round of the queue, which takes every stage of every level once.
//   behind  how many images this stage is behind the round's
//   first   tiles of the round before these
struct Segment {
  Stage stage;
  int level, behind;
  int first;
};

// Packed fp32 vectors (N, C) and maps (N, P).
//   map_t, attention_spatial, ...  first the teacher's sums, then what is made of them
//   mask, region      of the boxes, and with the teacher's attention
struct PersistentBuffers {
  float *weights_s, *weights_t, *channel_sums, *attention_channel;
  float *raw, *magnitude, *map_t, *attention_spatial, *region;
  const float* mask;
};

template <class X>
struct Persistent {
  static constexpr int kThreads = 256, kResident = 2, kWarps = kThreads / kWarp;
  // What a tile leaves of a map for its statistics, and of a comparison.
  static constexpr int kStatistics = 4, kSums = 7;
  using Once = Reduce<X, kValueSums, true>;
  using Again = Reduce<X, kRaw | kMagnitude | kMagnitudeSums>;
  using Writer = GradientTiles<X, kProduct | kSign | kSquares>;
  struct Shared {
    union {
      typename Once::Shared once;
      typename Again::Shared again;
      typename Writer::Shared writer;
      MapScratch maps;
    };
    float of_warp[kWarps];
    // What the block has taken from the queue: a tile of a level's image, or nothing of it, or that the queue has ended.
    Stage stage;
    int ticket, level, image, tile;
    bool is_last;
  };

  Once gradients[2];
  Again features[2];
  Writer gradient;
  PersistentBuffers buffers;
  MapOptions options;
  // Of each level: tiles of a stage, where its tiles' numbers begin, and what the formulas take.
  int64_t tiles[kStages][kLevels], statistics_at[kLevels], sums_at[kLevels], squares_at[kLevels];
  float divisor[kLevels], spatial_factor[kLevels], channel_factor[kLevels], scales[kPersistentRows];
  Segment segments[kStages * kLevels];
  // Tiles of a round, and rounds.
  int round, rounds;
  // (tensors, N, tiles, kStatistics), (N, tiles, kSums) and (N, tiles) of each level.
  float *statistics, *sums, *squares;
  // (4, L, N) and (3, L, N, STATE);   factors: (4, L, N), null for 1;   of_teacher: (L, N, 2) of its attention over pixels
  float *rows, *state, *of_teacher;
  const float* factors;
  // The next ticket, and of each item the tiles done of each stage and the stages done.
  int* counters;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    int next = me.index() == 0 ? me.take(counters) : 0;
    for (;;) {
      if (me.index() == 0) {
        shared.ticket = next;
        // The next one early, as the answer is long under way.
        next = me.take(counters);
      }
      me.sync();
      const int ticket = shared.ticket;
      if (ticket >= round * rounds) return;
      find(me, shared, ticket / round, ticket % round);
      me.sync();
      if (shared.image >= 0 && shared.image < places().images) run(me, shared);
      me.sync();
    }
  }

 private:
  KD_DEVICE const Places& places() const { return features[0].places; }
  KD_DEVICE const Place& place_of(int level) const { return places().place[level]; }
  // An image of a level among those of the pyramid.
  KD_DEVICE int64_t image_of(int level, int64_t n) const { return place_of(level).index * places().images + n; }
  KD_DEVICE int64_t images() const { return places().count * places().images; }
  KD_DEVICE float* state_of(int kind, int64_t image) const { return state + (kind * images() + image) * STATE; }
  KD_DEVICE float factor(int row, int64_t image) const {
    return factors != nullptr ? scales[row] * factors[row * images() + image] : scales[row];
  }
  KD_DEVICE int64_t map_of(int level, int64_t n) const { return place_of(level).map + n * place_of(level).pixels; }
  KD_DEVICE int64_t vector_of(int level, int64_t n) const { return place_of(level).vector + n * place_of(level).channels; }

  // The tile of a round: each thread looks at one segment, and the one whose it is writes it down.
  template <class Me>
  KD_DEVICE void find(Me& me, Shared& shared, int number, int tile) const {
    const int count = kStages * places().count, i = me.index();
    if (i >= count || tile < segments[i].first || (i + 1 < count && tile >= segments[i + 1].first)) return;
    shared.stage = segments[i].stage;
    shared.level = segments[i].level;
    shared.image = number - segments[i].behind;
    shared.tile = tile - segments[i].first;
  }

  // Of the block's item: the tiles done of each stage, and behind them the stages done.
  KD_DEVICE int* done_of(const Shared& shared) const { return counters + 1 + image_of(shared.level, shared.image) * (kStages + 1); }

  // These numbers are in shared memory, and read again where they are needed, so that they take no registers from the loops.
  template <class Me>
  KD_DEVICE void run(Me& me, Shared& shared) const {
    if (me.index() == 0) me.wait_for(done_of(shared) + kStages, static_cast<int>(shared.stage));
    me.sync();
    pass(me, shared, shared.stage, shared.level, shared.image, shared.tile);
    me.sync();
    if (me.index() == 0) {
      const int stage = static_cast<int>(shared.stage);
      shared.is_last = me.add(done_of(shared) + stage, 1) == tiles[stage][shared.level] - 1;
    }
    me.sync();
    if (!shared.is_last) return;
    end(me, shared, shared.stage, shared.level, shared.image);
    me.sync();
    if (me.index() == 0) me.add(done_of(shared) + kStages, 1);
  }

  template <class Me>
  KD_DEVICE void pass(Me& me, Shared& shared, Stage stage, int level, int64_t n, int tile) const {
    if (stage == Stage::weights) {
      const int64_t each = place_of(level).blocks;
      const int tensor = tile >= each ? 1 : 0;
      gradients[tensor].read(me, shared.once, level, n, tile - tensor * each);
    } else if (stage == Stage::sums) {
      read_features(me, shared, level, n, tile);
    } else if (stage == Stage::compare) {
      compare(me, shared, level, n, tile);
    } else {
      write(me, shared, level, n, tile);
    }
  }

  template <class Me>
  KD_DEVICE void end(Me& me, Shared& shared, Stage stage, int level, int64_t n) const {
    if (stage == Stage::weights) {
      end_weights(me, level, n);
    } else if (stage == Stage::sums) {
      end_sums(me, shared, level, n);
    } else if (stage == Stage::compare) {
      end_compare(me, shared, level, n);
    } else {
      end_write(me, shared, level, n);
    }
  }

  // The channel sums of an image that the tiles of a read have left, times `by`.
  template <class Me, class Read>
  KD_DEVICE void sum_parts(Me& me, const Read& read, int level, int64_t n, float by, float* out) const {
    const Place& place = place_of(level);
    const float* from = read.parts + read.part[level] + n * place.blocks * place.channels;
    for (int64_t c = me.index(); c < place.channels; c += kThreads) {
      // As many loads on their way at once, and sums, which need not wait for each other.
      constexpr int kTiles = 16;
      float total[kTiles] = {};
      for (int64_t tile = 0; tile < place.blocks; tile += kTiles) {
        KD_UNROLL
        for (int k = 0; k < kTiles; ++k) total[k] += tile + k < place.blocks ? from[(tile + k) * place.channels + c] : 0.0f;
      }
      KD_UNROLL
      for (int k = 1; k < kTiles; ++k) total[0] += total[k];
      out[c] = total[0] * by;
    }
  }

  template <class Me>
  KD_DEVICE void end_weights(Me& me, int level, int64_t n) const {
    const int64_t vector = vector_of(level, n);
    const float by = 1.0f / static_cast<float>(place_of(level).pixels);
    sum_parts(me, gradients[0], level, n, by, buffers.weights_s + vector);
    sum_parts(me, gradients[1], level, n, by, buffers.weights_t + vector);
  }

  template <class Me>
  KD_DEVICE void read_features(Me& me, Shared& shared, int level, int64_t n, int tile) const {
    const Place& place = place_of(level);
    const int tensor = tile >= place.blocks ? 1 : 0;
    const int64_t own = tile - tensor * place.blocks;
    const Again& read = features[tensor];
    read.read(me, shared.again, level, n, own);
    // Its pixels again, which this block has just written.
    const int64_t length = place.last ? kBand : kSpan<X>, pixel = own * length + me.index();
    const bool there = me.index() < length && pixel < place.pixels;
    const int64_t map = map_of(level, n), first = map + own * length;
    const float r = rectified(read.raw[there ? map + pixel : first], options.rectify), a = there ? read.magnitude[map + pixel] : 0.0f;
    float x[] = {r, r, a};
    join_all(me, shared.maps, x, join_extremes);
    const auto& [low, high, maximum] = x;
    const float total = block_sum(me, there ? expf((a - maximum) * spatial_factor[level]) : 0.0f, shared.of_warp, kWarps);
    if (me.index() == 0) {
      float* const left = statistics_of(tensor, level, n) + own * kStatistics;
      left[0] = low, left[1] = high, left[2] = maximum, left[3] = total;
    }
  }

  // Of the lowest, the highest and the largest.
  KD_DEVICE static float join_extremes(int k, float a, float b) { return k == 0 ? smaller(a, b) : larger(a, b); }

  KD_DEVICE float* statistics_of(int64_t tensor, int level, int64_t n) const {
    const Place& place = place_of(level);
    return statistics + statistics_at[level] + (tensor * places().images + n) * place.blocks * kStatistics;
  }

  // What the tiles' numbers say of a whole map.
  template <class Me>
  KD_DEVICE void bring_together(Me& me, Shared& shared, int64_t tensor, int level, int64_t n, MapStatistics& map,
                                AttentionStatistics& attention) const {
    const Place& place = place_of(level);
    const float* const left = statistics_of(tensor, level, n);
    float low = left[0], high = left[1], maximum = left[2];
    for (int64_t tile = me.index(); tile < place.blocks; tile += kThreads) {
      low = smaller(low, left[tile * kStatistics]);
      high = larger(high, left[tile * kStatistics + 1]);
      maximum = larger(maximum, left[tile * kStatistics + 2]);
    }
    float x[] = {low, high, maximum};
    join_all(me, shared.maps, x, join_extremes);
    low = x[0], high = x[1], maximum = x[2];
    float total = 0;
    for (int64_t tile = me.index(); tile < place.blocks; tile += kThreads) {
      total += left[tile * kStatistics + 3] * expf((left[tile * kStatistics + 2] - maximum) * spatial_factor[level]);
    }
    total = block_sum(me, total, shared.of_warp, kWarps);
    map = minmax_of(low, high, options);
    attention = {maximum, static_cast<float>(place.pixels) / total};
  }

  template <class Me>
  KD_DEVICE void end_sums(Me& me, Shared& shared, int level, int64_t n) const {
    const Place& place = place_of(level);
    const int64_t image = image_of(level, n), vector = vector_of(level, n);
    MapStatistics student, teacher;
    AttentionStatistics own, goal;
    bring_together(me, shared, 0, level, n, student, own);
    bring_together(me, shared, 1, level, n, teacher, goal);
    if (me.index() == 0) {
      const float of_map[STATE] = {student.shift, student.centre, student.scale, teacher.shift, teacher.centre, teacher.scale, 0, 0};
      for (int k = 0; k < STATE; ++k) {
        state_of(0, image)[k] = of_map[k];
        state_of(1, image)[k] = k == 0 ? own.maximum : k == 1 ? own.scale : 0.0f;
        state_of(2, image)[k] = 0;
      }
      of_teacher[2 * image] = goal.maximum, of_teacher[2 * image + 1] = goal.scale;
    }
    float* const channel_sums = buffers.channel_sums + vector;
    float* const target = buffers.attention_channel + vector;
    sum_parts(me, features[0], level, n, 1, channel_sums);
    sum_parts(me, features[1], level, n, 1, target);
    me.sync();
    const float by = channel_factor[level];
    const AttentionStatistics of_channels = attention_statistics(me, shared.maps, target, place.channels, by);
    for (int64_t c = me.index(); c < place.channels; c += kThreads) target[c] = attention_of(target[c], of_channels, by);
    me.sync();
    const float value = attention_distance(me, shared.maps, channel_sums, target, state_of(2, image), place.channels, by);
    if (me.index() == 0) rows[2 * images() + image] = value * factor(2, image);
  }

  template <class Me>
  KD_DEVICE void compare(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = place_of(level);
    const int64_t image = image_of(level, n), map = map_of(level, n), end = (tile + 1) * kCompared;
    const float* const known = state_of(0, image);
    const MapStatistics student{options.normalize, known[0], known[1], known[2], 0};
    const MapStatistics teacher{options.normalize_target, known[3], known[4], known[5], 0};
    const AttentionStatistics own{state_of(1, image)[0], state_of(1, image)[1]};
    const AttentionStatistics goal{of_teacher[2 * image], of_teacher[2 * image + 1]};
    float x[kSums] = {};
    for (int64_t p = tile * kCompared + me.index(); p < end && p < place.pixels; p += kThreads) {
      const float target = rectified(buffers.map_t[map + p], options.rectify);
      add_compared(x, rectified(buffers.raw[map + p], options.rectify), target, 1, student, teacher, options);
      const float attention = attention_of(buffers.attention_spatial[map + p], goal, spatial_factor[level]);
      const float mine = attention_of(buffers.magnitude[map + p], own, spatial_factor[level]);
      x[5] += fabsf(mine - attention);
      x[6] += kd::sign(mine - attention) * mine;
      buffers.map_t[map + p] = target;
      buffers.attention_spatial[map + p] = attention;
      buffers.region[map + p] = buffers.mask[map + p] * attention;
    }
    float* const left = sums_of(level, n) + tile * kSums;
    for (int k = 0; k < kSums; ++k) {
      const float total = block_sum(me, x[k], shared.of_warp, kWarps);
      if (me.index() == 0) left[k] = total;
    }
  }

  KD_DEVICE float* sums_of(int level, int64_t n) const {
    return sums + sums_at[level] + n * tiles[static_cast<int>(Stage::compare)][level] * kSums;
  }

  template <class Me>
  KD_DEVICE void end_compare(Me& me, Shared& shared, int level, int64_t n) const {
    const Place& place = place_of(level);
    const int64_t image = image_of(level, n), count = tiles[static_cast<int>(Stage::compare)][level];
    const float* const left = sums_of(level, n);
    float x[kSums] = {};
    for (int k = 0; k < kSums; ++k) {
      for (int64_t tile = me.index(); tile < count; tile += kThreads) x[k] += left[tile * kSums + k];
      x[k] = block_sum(me, x[k], shared.of_warp, kWarps);
    }
    if (me.index() != 0) return;
    const float value = end_map(x, state_of(0, image), place.pixels, divisor[level], options);
    rows[image] = value * factor(0, image);
    rows[images() + image] = x[5] * factor(1, image);
    state_of(1, image)[2] = x[6];
  }

  template <class Me>
  KD_DEVICE void write(Me& me, Shared& shared, int level, int64_t n, int64_t tile) const {
    const Place& place = place_of(level);
    const int64_t image = image_of(level, n), map = map_of(level, n), vector = vector_of(level, n);
    const auto of_channel = [&](int64_t c) {
      const float slope = attention_gradient(buffers.channel_sums + vector, buffers.attention_channel + vector, state_of(2, image),
                                             factor(2, image), c, place.channels, channel_factor[level]);
      return Numbers{buffers.weights_s[vector + c], slope, buffers.attention_channel[vector + c]};
    };
    const auto of_pixel = [&](int64_t p) {
      const float product = map_gradient(buffers.raw + map, buffers.map_t + map, nullptr, state_of(0, image), factor(0, image), p,
                                         divisor[level], options);
      const float slope = attention_gradient(buffers.magnitude + map, buffers.attention_spatial + map, state_of(1, image), factor(1, image),
                                             p, place.pixels, spatial_factor[level]);
      return Numbers{product, slope, 2.0f * factor(3, image) * buffers.region[map + p]};
    };
    const float mine = gradient.write(me, shared.writer, level, n, tile, of_channel, of_pixel);
    const float total = block_sum(me, mine, shared.of_warp, kWarps);
    if (me.index() == 0) squares_of(level, n)[tile] = total;
  }

  KD_DEVICE float* squares_of(int level, int64_t n) const {
    return squares + squares_at[level] + n * tiles[static_cast<int>(Stage::write)][level];
  }

  template <class Me>
  KD_DEVICE void end_write(Me& me, Shared& shared, int level, int64_t n) const {
    const int64_t image = image_of(level, n), count = tiles[static_cast<int>(Stage::write)][level];
    float total = 0;
    for (int64_t tile = me.index(); tile < count; tile += kThreads) total += squares_of(level, n)[tile];
    total = block_sum(me, total, shared.of_warp, kWarps);
    // The factor is in it already.
    if (me.index() == 0) rows[3 * images() + image] = 0.5f * total;
  }
};

}  // namespace kd
