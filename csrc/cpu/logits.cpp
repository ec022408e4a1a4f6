#include "logits.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <numeric>

#include "bands.h"
#include "parallel.h"
#include "rows.h"

#define KD_KERNELS "logits.inl"
#include "each_isa.h"

namespace kd {

const LogitKernels& logit_kernels() { return chosen(scalar::kernels, avx2::kernels, avx512::kernels); }

namespace {

// Elements of a tile, as far as whole pixels or channels allow.
constexpr int64_t TILE = 4096;

// What a thread needs for one tile.
struct Scratch {
  std::vector<float> s, t, made, line, weight, room;

  static float* of(std::vector<float>& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
    return buffer.data();
  }
};

// Goes over both networks' logits in tiles.
class Logits {
 public:
  Logits(const std::vector<Tensor>& s, const std::vector<Tensor>& t, const std::optional<Tensor>& weight, const LogitDifference& of)
      : s_(s), t_(t, &s_), of_(of), places_(s_), bands_(s_), rows_(row_kernels()), weight_(floats(weight, s_.maps())) {}

  const Pyramid& levels() const { return s_; }

  // To rows (L, N): the sums of each level and image.
  void sums(float* rows) const {
    std::vector<double> values(bands_.count());
    for_each(bands_.count(), [&](int64_t i) { values[i] = band(bands_[i], 1.0f, nullptr); });
    for (int64_t place = 0; place < all_images(s_).last; ++place) {
      const auto begin = values.begin() + bands_.before(place);
      rows[place] = static_cast<float>(std::accumulate(begin, begin + bands_.of_image(place / s_.images()), 0.0));
    }
  }

  // To the gradients, from that of the rows.
  void gradient(const float* grad, const Results& out) const {
    for_each(bands_.count(), [&](int64_t i) {
      const Band at = bands_[i];
      band(at, grad[at.level * s_.images() + at.image], &out[at.level]);
    });
  }

 private:
  double band(const Band& at, float scale, const Level* out) const {
    thread_local Scratch scratch;
    const Level& s = s_[at.level];
    // Where elements are independent of each other, those of a pixel are as good as so many pixels.
    const bool flat = of_.groups == 0 && s.last;
    const int64_t groups = of_.groups == 0 ? 1 : of_.groups, bins = flat ? 1 : s.channels / groups, most = of_.groups == 0 ? 1 : bins;
    const int64_t step = std::max<int64_t>(1, TILE / (flat ? s.channels : most));
    double total = 0;
    for (int64_t first = 0; first < at.pixels; first += step) {
      const int64_t pixels = std::min(step, at.pixels - first), begin = at.first + first;
      const float* weight = weight_ == nullptr ? nullptr : weight_ + places_.map[at.level] + at.image * s.pixels + begin;
      LogitTile tile{};
      tile.scale = scale;
      if (flat) {
        tile.weight = weight == nullptr ? nullptr : repeated(weight, pixels, s.channels, scratch);
        tile.rows = 1, tile.count = tile.stride = pixels * s.channels;
        total += run(tile, at, begin, 0, out, scratch);
        continue;
      }
      tile.weight = weight;
      tile.rows = most, tile.count = tile.stride = pixels;
      for (int64_t channel = 0; channel < s.channels; channel += most) total += run(tile, at, begin, channel, out, scratch);
    }
    return total;
  }

  static const float* repeated(const float* weight, int64_t pixels, int64_t times, Scratch& scratch) {
    float* const to = Scratch::of(scratch.weight, pixels * times);
    for (int64_t p = 0; p < pixels; ++p) std::fill_n(to + p * times, times, weight[p]);
    return to;
  }

  // The tile from pixel `first` and `channel` on.
  double run(LogitTile& tile, const Band& at, int64_t first, int64_t channel, const Level* out, Scratch& scratch) const {
    const int64_t elements = tile.rows * tile.count;
    tile.s = read(s_[at.level], tile, at, first, channel, Scratch::of(scratch.s, elements), scratch);
    tile.t = read(t_[at.level], tile, at, first, channel, Scratch::of(scratch.t, elements), scratch);
    tile.room = Scratch::of(scratch.room, 2 * tile.rows * LANES);
    tile.out = out == nullptr ? nullptr : Scratch::of(scratch.made, elements);
    const double total = of_.run(tile);
    if (out != nullptr) write(*out, tile, at, first, channel, scratch);
    return total;
  }

  // Whether the tile's rows are channels that lie side by side in a pixel.
  bool turned(const Level& level) const { return level.last && of_.groups > 0; }

  static char* place(const Level& level, const Band& at, int64_t pixel, int64_t channel) {
    const int64_t element = level.last ? pixel * level.channels + channel : channel * level.pixels + pixel;
    return level.data + at.image * level.image_bytes() + element * bytes_of(level.type);
  }

  const float* read(const Level& level, const LogitTile& tile, const Band& at, int64_t first, int64_t channel, float* to,
                    Scratch& scratch) const {
    const auto widen = rows_.widen[static_cast<int>(level.type)];
    if (!turned(level)) {
      for (int64_t row = 0; row < tile.rows; ++row) widen(place(level, at, first, channel + row), to + row * tile.stride, tile.count);
      return to;
    }
    float* const line = Scratch::of(scratch.line, tile.rows);
    for (int64_t p = 0; p < tile.count; ++p) {
      widen(place(level, at, first + p, channel), line, tile.rows);
      for (int64_t row = 0; row < tile.rows; ++row) to[row * tile.stride + p] = line[row];
    }
    return to;
  }

  void write(const Level& level, const LogitTile& tile, const Band& at, int64_t first, int64_t channel, Scratch& scratch) const {
    const auto narrow = rows_.narrow[static_cast<int>(level.type)];
    if (!turned(level)) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        narrow(tile.out + row * tile.stride, place(level, at, first, channel + row), tile.count);
      }
      return;
    }
    float* const line = Scratch::of(scratch.line, tile.rows);
    for (int64_t p = 0; p < tile.count; ++p) {
      for (int64_t row = 0; row < tile.rows; ++row) line[row] = tile.out[row * tile.stride + p];
      narrow(line, place(level, at, first + p, channel), tile.rows);
    }
  }

  const Pyramid s_, t_;
  const LogitDifference& of_;
  const Places places_;
  const Bands bands_;
  const RowKernels& rows_;
  const float* const weight_;
};

}  // namespace

Tensor logit_rows(const std::vector<Tensor>& s, const std::vector<Tensor>& t, const std::optional<Tensor>& weight,
                  const LogitDifference& of) {
  const Logits logits(s, t, weight, of);
  const Tensor rows = new_floats({static_cast<int64_t>(s.size()), logits.levels().images()});
  logits.sums(floats(rows));
  return rows;
}

std::vector<Tensor> logit_gradient(const Tensor& grad, const std::vector<Tensor>& s, const std::vector<Tensor>& t,
                                   const std::optional<Tensor>& weight, const LogitDifference& of) {
  const Logits logits(s, t, weight, of);
  Results out(s, logits.levels());
  logits.gradient(floats(grad, static_cast<int64_t>(s.size()) * logits.levels().images()), out);
  return out.finish();
}

}  // namespace kd
