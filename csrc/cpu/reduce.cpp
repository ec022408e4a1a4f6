#include "reduce.h"

#include <algorithm>
#include <vector>

#include "bands.h"
#include "parallel.h"
#include "rows.h"

namespace kd {
namespace {

constexpr int64_t PIXELS = 2048;
constexpr int64_t AHEAD = 16384;

// Rows of x and of its target as fp32, where they are of different types.
class Widened {
 public:
  const char* operator()(const char* row, Type type, int64_t count) {
    rows_.emplace_back(count);
    row_kernels().widen[static_cast<int>(type)](row, rows_.back().data(), count);
    return reinterpret_cast<const char*>(rows_.back().data());
  }

 private:
  std::vector<std::vector<float>> rows_;
};

// One band of `x`, all of whose sums it makes. sums: (C,) sums of the band's pixels, or null.
void read_band(const Level& x, const Level* target, const Band& band, const Places& places, const Reading& wanted, float* sums) {
  const int64_t map = places.map[band.level] + band.image * x.pixels + band.first;
  const int64_t vector = places.vector[band.level] + band.image * x.channels;
  const RowKernels& rows = row_kernels();
  const bool mixed = target != nullptr && target->type != x.type;
  const int type = static_cast<int>(mixed ? Type::fp32 : x.type);
  const int64_t outer = x.last ? band.pixels : x.channels, count = x.last ? x.channels : band.pixels;
  // Of the band's first row, in bytes, and from row to row.
  const auto first = [&](const Level& of) {
    return of.data + band.image * of.image_bytes() + band.first * (of.last ? of.row_bytes() : bytes_of(of.type));
  };
  const char* x_row = first(x);
  const char* target_row = target != nullptr ? first(*target) : nullptr;
  float* const raw = wanted.raw != nullptr ? wanted.raw + map : nullptr;
  float* const magnitude = wanted.magnitude != nullptr ? wanted.magnitude + map : nullptr;
  float* const error = wanted.error != nullptr ? wanted.error + map : nullptr;
  const float* const weights = wanted.weights != nullptr ? wanted.weights + vector : nullptr;
  const float* const error_weights = wanted.error_channel != nullptr ? wanted.error_channel + vector : nullptr;
  if (x.last) {
    if (sums != nullptr) std::fill_n(sums, count, 0.0f);
  } else {
    for (float* out : {raw, magnitude, error}) {
      if (out != nullptr) std::fill_n(out, count, 0.0f);
    }
  }
  for (int64_t row = 0; row < outer;) {
    const int together = outer - row >= MOST_ROWS ? MOST_ROWS : 1;
    const char *xs[MOST_ROWS], *targets[MOST_ROWS];
    Widened widened;
    for (int r = 0; r < together; ++r) {
      xs[r] = x_row + (row + r) * x.row_bytes();
      targets[r] = target != nullptr ? target_row + (row + r) * target->row_bytes() : nullptr;
      if (mixed) {
        xs[r] = widened(xs[r], x.type, count);
        targets[r] = widened(targets[r], target->type, count);
      }
    }
    if (x.last) {
      Across a{{}, {}, count, weights, error_weights, raw ? raw + row : nullptr, magnitude ? magnitude + row : nullptr,
               error ? error + row : nullptr, sums, wanted.absolute, wanted.sums == ChannelSums::of_magnitudes, AHEAD};
      std::copy_n(xs, together, a.x);
      std::copy_n(targets, together, a.target);
      rows.across[type][together > 1](a);
    } else {
      Down a{{}, {}, count, {}, {}, raw, magnitude, error, sums ? sums + row : nullptr, wanted.absolute,
             wanted.sums == ChannelSums::of_magnitudes, together * x.row_bytes()};
      for (int r = 0; r < together; ++r) {
        a.x[r] = xs[r];
        a.target[r] = targets[r];
        a.weight[r] = weights ? weights[row + r] : 1.0f;
        a.error_weight[r] = error_weights ? error_weights[row + r] : 1.0f;
      }
      rows.down[type][together > 1](a);
    }
    row += together;
  }
}

}  // namespace

void reduce(const Pyramid& x, const Reading& wanted, Images images) {
  const Places places(x);
  const Bands bands(x, PIXELS);
  const bool sums = wanted.sums != ChannelSums::none;
  // Sums of each band, one after the other as the bands are.
  const int64_t first = bands.before(images.first), count = bands.before(images.last) - first;
  std::vector<int64_t> part_places(count + 1);
  for (int64_t i = 0; i < count; ++i) part_places[i + 1] = part_places[i] + (sums ? x[bands[first + i].level].channels : 0);
  const Tensor parts = new_floats({part_places[count]});
  for_each(count, [&](int64_t i) {
    const Band band = bands[first + i];
    const Level* target = wanted.target != nullptr ? &(*wanted.target)[band.level] : nullptr;
    read_band(x[band.level], target, band, places, wanted, sums ? floats(parts) + part_places[i] : nullptr);
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
