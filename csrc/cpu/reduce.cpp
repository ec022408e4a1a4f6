#include "reduce.h"

#include <algorithm>
#include <vector>

#include "bands.h"
#include "parallel.h"
#include "rows.h"

namespace kd {
namespace {

// Channels of which a pixel's fp32 sum is made at a time.
constexpr int64_t CHANNELS = 256;
// Bytes ahead that are asked for in a channels_last level, which is read from end to end.
constexpr int64_t AHEAD = 16384;

// What a thread needs for one band: maps of more channels than are summed at a time, and rows of different types as fp32.
struct Scratch {
  std::vector<float> maps[3], rows[2 * MOST_ROWS];
};

// Reads one band. sums: (C,) sums of the band's pixels, or null.
class Reader {
 public:
  Reader(const Level& x, const Level* target, const Band& band, const Places& places, const Reading& wanted, float* sums)
      : x_(x), target_(target), band_(band), sums_(sums), mixed_(target != nullptr && target->type != x.type) {
    const int64_t map = places.map[band.level] + band.image * x.pixels + band.first;
    const int64_t vector = places.vector[band.level] + band.image * x.channels;
    float* const packed[] = {wanted.raw, wanted.magnitude, wanted.error};
    for (int k = 0; k < 3; ++k) maps_[k] = packed[k] != nullptr ? packed[k] + map : nullptr;
    weights_ = wanted.weights != nullptr ? wanted.weights + vector : nullptr;
    error_weights_ = wanted.error_channel != nullptr ? wanted.error_channel + vector : nullptr;
    pixel_weights_ = wanted.pixel_weights != nullptr ? wanted.pixel_weights + map : nullptr;
    absolute_ = wanted.absolute;
    of_magnitudes_ = wanted.sums == ChannelSums::of_magnitudes;
  }

  void read() {
    if (x_.last) {
      read_pixels();
    } else {
      read_channels();
    }
  }

 private:
  // Of a contiguous level, in which a row is the band's pixels of a channel.
  void read_channels() {
    Down a{};
    a.count = band_.pixels;
    a.pixel_weights = pixel_weights_;
    a.absolute = absolute_, a.of_magnitudes = of_magnitudes_;
    for (int64_t first = 0; first < x_.channels; first += CHANNELS) {
      float* into[3];
      for (int k = 0; k < 3; ++k) {
        into[k] = first == 0 || maps_[k] == nullptr ? maps_[k] : sized(scratch().maps[k], a.count);
        if (into[k] != nullptr) std::fill_n(into[k], a.count, 0.0f);
      }
      a.raw = into[0], a.magnitude = into[1], a.error = into[2];
      const int64_t end = std::min(first + CHANNELS, x_.channels);
      for (int64_t row = first; row < end; row += together(row, end)) {
        const int rows = together(row, end);
        take(row, rows, a.count, a.x, a.target);
        for (int r = 0; r < rows; ++r) {
          a.weight[r] = weights_ != nullptr ? weights_[row + r] : 1.0f;
          a.error_weight[r] = error_weights_ != nullptr ? error_weights_[row + r] : 1.0f;
        }
        a.sums = sums_ != nullptr ? sums_ + row : nullptr;
        a.ahead = rows * x_.row_bytes();
        row_kernels().down[type()][rows > 1](a);
      }
      for (int k = 0; k < 3 && first > 0; ++k) {
        for (int64_t p = 0; into[k] != nullptr && p < a.count; ++p) maps_[k][p] += into[k][p];
      }
    }
  }

  // Of a channels_last level, in which a row is the channels of a pixel.
  void read_pixels() {
    Across a{};
    a.count = x_.channels;
    a.weights = weights_, a.error_weights = error_weights_;
    a.absolute = absolute_, a.of_magnitudes = of_magnitudes_;
    a.channel = sums_;
    a.ahead = AHEAD;
    if (sums_ != nullptr) std::fill_n(sums_, a.count, 0.0f);
    for (int64_t row = 0; row < band_.pixels; row += together(row, band_.pixels)) {
      const int rows = together(row, band_.pixels);
      take(row, rows, a.count, a.x, a.target);
      float** const out[] = {&a.raw, &a.magnitude, &a.error};
      for (int k = 0; k < 3; ++k) *out[k] = maps_[k] != nullptr ? maps_[k] + row : nullptr;
      a.pixel_weights = pixel_weights_ != nullptr ? pixel_weights_ + row : nullptr;
      row_kernels().across[type()][rows > 1](a);
    }
  }

  static int together(int64_t row, int64_t end) { return end - row >= MOST_ROWS ? MOST_ROWS : 1; }

  int type() const { return static_cast<int>(mixed_ ? Type::fp32 : x_.type); }

  // Where some rows are, as fp32 where x and its target are of different types.
  void take(int64_t row, int rows, int64_t count, const char** x, const char** target) const {
    for (int r = 0; r < rows; ++r) {
      x[r] = at(x_, row + r, count, r);
      target[r] = target_ != nullptr ? at(*target_, row + r, count, MOST_ROWS + r) : nullptr;
    }
  }

  const char* at(const Level& level, int64_t row, int64_t count, int buffer) const {
    const int64_t first = band_.first * (level.last ? level.row_bytes() : bytes_of(level.type));
    const char* const place = level.data + band_.image * level.image_bytes() + first + row * level.row_bytes();
    if (!mixed_) return place;
    float* const wide = sized(scratch().rows[buffer], count);
    row_kernels().widen[static_cast<int>(level.type)](place, wide, count);
    return reinterpret_cast<const char*>(wide);
  }

  static Scratch& scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  static float* sized(std::vector<float>& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
    return buffer.data();
  }

  const Level& x_;
  const Level* const target_;
  const Band& band_;
  // raw, magnitude and error: the band's part of each map, or null.
  float* maps_[3];
  const float *weights_, *error_weights_, *pixel_weights_;
  float* const sums_;
  bool absolute_, of_magnitudes_;
  const bool mixed_;
};

}  // namespace

void reduce(const Pyramid& x, const Reading& wanted, Images images) {
  const Places places(x);
  const Bands bands(x);
  const bool sums = wanted.sums != ChannelSums::none;
  // Sums of each band, one after the other as the bands are.
  const int64_t first = bands.before(images.first), count = bands.before(images.last) - first;
  std::vector<int64_t> part_places(count + 1);
  for (int64_t i = 0; i < count; ++i) part_places[i + 1] = part_places[i] + (sums ? x[bands[first + i].level].channels : 0);
  const Tensor parts = new_floats({part_places[count]});
  for_each(count, [&](int64_t i) {
    const Band band = bands[first + i];
    const Level* target = wanted.target != nullptr ? &(*wanted.target)[band.level] : nullptr;
    Reader(x[band.level], target, band, places, wanted, sums ? floats(parts) + part_places[i] : nullptr).read();
  });
  if (!sums) return;
  for_each(images.last - images.first, [&](int64_t i) {
    const int64_t place = images.first + i;
    const size_t level = place / x.images();
    const int64_t channels = x[level].channels, of_image = bands.of_image(level);
    const float* part = floats(parts) + part_places[bands.before(place) - first];
    float* out = wanted.channel + places.vector[level] + (place % x.images()) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t b = 0; b < of_image; ++b) total += part[b * channels + c];
      out[c] = static_cast<float>(total);
    }
  });
}

}  // namespace kd
