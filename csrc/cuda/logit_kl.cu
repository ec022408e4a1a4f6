// `logit_kl` on CUDA: the divergence of two networks' logits, blocks of channels each a distribution.
#include "logits.h"

namespace kd {
namespace {

// Numbers of each network that a block shares: its distributions, beside each other.
constexpr int kRoom = 3072;
// Threads of a distribution.
constexpr int kTeam = 8;

// Distributions that a block takes: as many as there is room for, whole cache lines of them in a contiguous level. One is a line; it has a
// gap behind it where the lines would all begin in the same bank.
struct Lines {
  int64_t bins, stride, most;

  KD_BOTH explicit Lines(int64_t count) : bins(count), stride(count | 1), most(kRoom / stride) {
    if (most > kWarp) most -= most % kWarp;
  }
  KD_BOTH bool fits() const { return most > 0; }
  KD_BOTH int64_t of_block() const { return fits() ? most : 1; }
};

// What the team of a thread has brought together.
template <class Me, class Join>
KD_DEVICE float team_join(Me& me, float x, const Join& join) {
  for (int mask = kTeam / 2; mask > 0; mask /= 2) x = join(x, me.across(x, mask));
  return x;
}

template <bool kGradient>
struct Divergence {
  static constexpr int kThreads = 256, kResident = 4, kWarps = kThreads / kWarp;
  struct Shared {
    float s[kRoom], t[kRoom];
    float of_warp[kWarps];
  };

  LogitLevels levels;
  int64_t groups;
  // 1 / temperature.
  float scale;

  // Of a block.
  //   at       the first element of its first line;   line, bin: to the next one
  //   lines    how many it has;   first: among those of the image, or of the group's pixels in a contiguous level
  struct Tile {
    int64_t at, line, bin, first;
    int lines;
  };

  static int64_t blocks(const Level& level, int64_t groups) {
    const int64_t of_block = Lines(level.channels / groups).of_block();
    return level.last ? ceil_div(level.pixels * groups, of_block) : groups * ceil_div(level.pixels, of_block);
  }

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const LogitImage image = LogitImage::of(levels, me.block());
    const Lines lines(image.place.channels / groups);
    const Tile tile = tile_of(image, lines);
    if (lines.fits()) {
      each_element(me, image, tile, lines, [&](int64_t from, int room) {
        shared.s[room] = element_at(image.s, from);
        shared.t[room] = element_at(image.t, from);
      });
      me.sync();
    }
    float total = 0;
    for (int first = 0; first < tile.lines; first += kThreads / kTeam) {
      const int line = first + me.index() / kTeam;
      total += one_line(me, shared, image, tile, lines, line);
    }
    if (!kGradient) {
      total = block_sum(me, total, shared.of_warp, kWarps);
      if (me.index() == 0) levels.parts[me.block()] = total;
    } else if (lines.fits()) {
      me.sync();
      each_element(me, image, tile, lines, [&](int64_t to, int room) { write_element(image.out, image.s.type, to, shared.s[room]); });
    }
  }

 private:
  KD_DEVICE Tile tile_of(const LogitImage& image, const Lines& lines) const {
    const int64_t pixels = image.place.pixels, of_block = lines.of_block();
    Tile tile;
    int64_t left;
    if (image.place.last) {
      tile.first = image.tile * of_block;
      tile.at = image.first + tile.first * lines.bins;
      tile.line = lines.bins, tile.bin = 1;
      left = pixels * groups - tile.first;
    } else {
      const int64_t across = ceil_div(pixels, of_block);
      tile.first = image.tile % across * of_block;
      tile.at = image.first + image.tile / across * lines.bins * pixels + tile.first;
      tile.line = 1, tile.bin = pixels;
      left = pixels - tile.first;
    }
    tile.lines = static_cast<int>(left < of_block ? left : of_block);
    return tile;
  }

  // Calls take(place in memory, place in the room) for the elements of the tile, neighbours in memory by neighbouring threads.
  template <class Me, class Take>
  KD_DEVICE void each_element(Me& me, const LogitImage& image, const Tile& tile, const Lines& lines, const Take& take) const {
    const int bins = static_cast<int>(lines.bins), stride = static_cast<int>(lines.stride), count = tile.lines * bins;
    for (int i = me.index(); i < count; i += kThreads) {
      const int line = image.place.last ? i / bins : i % tile.lines, bin = image.place.last ? i % bins : i / tile.lines;
      take(tile.at + line * tile.line + bin * tile.bin, line * stride + bin);
    }
  }

  // The thread's part of the divergence of a line, which may not be there, or its gradient, in the room where there is one.
  template <class Me>
  KD_DEVICE float one_line(Me& me, Shared& shared, const LogitImage& image, const Tile& tile, const Lines& lines, int line) const {
    const bool there = line < tile.lines, staged = lines.fits();
    const int64_t from = tile.at + line * tile.line, bins = there ? lines.bins : 0;
    const int begin = me.index() % kTeam, room = staged ? line * static_cast<int>(lines.stride) : 0;
    const auto s = [&](int64_t b) { return staged ? shared.s[room + b] : element_at(image.s, from + b * tile.bin); };
    const auto t = [&](int64_t b) { return staged ? shared.t[room + b] : element_at(image.t, from + b * tile.bin); };
    float highest_s = -INFINITY, highest_t = -INFINITY, sum_s = 0, sum_t = 0, value = 0;
    for (int64_t b = begin; b < bins; b += kTeam) highest_s = larger(highest_s, s(b)), highest_t = larger(highest_t, t(b));
    const auto join_largest = [](float a, float b) { return larger(a, b); };
    highest_s = team_join(me, highest_s, join_largest);
    highest_t = team_join(me, highest_t, join_largest);
    for (int64_t b = begin; b < bins; b += kTeam) {
      sum_s += expf((s(b) - highest_s) * scale);
      sum_t += expf((t(b) - highest_t) * scale);
    }
    const auto join_sum = [](float a, float b) { return a + b; };
    sum_s = team_join(me, sum_s, join_sum);
    sum_t = team_join(me, sum_t, join_sum);
    if (!there) return 0;
    const float logs = logf(sum_t) - logf(sum_s);
    const float weight = image.weight_of(image.place.last ? (tile.first + line) / groups : tile.first + line);
    for (int64_t b = begin; b < bins; b += kTeam) {
      const float x = s(b) - highest_s, y = t(b) - highest_t;
      const float p = expf(x * scale) / sum_s, q = expf(y * scale) / sum_t;
      // A bin that the teacher rules out adds p alone, also where its logit is -inf.
      const float r = q == 0 ? 0.0f : (y - x) * scale - logs;
      const bool near = fabsf(r) < 0.5f && q > 0;
      // Of distributions that differ little nothing is left but second-order terms.
      const float second = second_order(r);
      if (kGradient) {
        const float slope = (near ? q * (second - r) : p - q) * scale * weight * image.scale;
        if (staged) {
          shared.s[room + b] = slope;
        } else {
          write_element(image.out, image.s.type, from + b * tile.bin, slope);
        }
      } else {
        // q * (log q - log p) + p - q, whose sum is the divergence.
        value += (near ? q * second : (p - q) + q * r) * weight;
      }
    }
    return value;
  }
};

// Calls go(blocks, make), what `Logits` wants of a kernel.
template <class Kernel, class Go>
auto with(double temperature, int64_t groups, const Go& go) {
  return go([groups](const Level& level) { return Kernel::blocks(level, groups); },
            [=](const LogitLevels& levels) { return Kernel{levels, groups, 1.0f / static_cast<float>(temperature)}; });
}

Tensor logit_kl(std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight, double temperature, int64_t groups) {
  const Logits logits(s, t, weight);
  return with<Divergence<false>>(temperature, groups, [&](const auto& blocks, const auto& make) { return logits.rows(blocks, make); });
}

std::vector<Tensor> logit_kl_backward(Tensor grad, std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight,
                                      double temperature, int64_t groups) {
  const Logits logits(s, t, weight);
  return with<Divergence<true>>(temperature, groups,
                                [&](const auto& blocks, const auto& make) { return logits.gradient(grad, blocks, make); });
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("logit_kl", TORCH_BOX(&kd::logit_kl));
  m.impl("logit_kl_backward", TORCH_BOX(&kd::logit_kl_backward));
}
