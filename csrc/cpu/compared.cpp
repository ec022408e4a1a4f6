#include "compared.h"

#include "isa.h"
#include "parallel.h"
#include "row_access.h"

#define KD_KERNELS "compared.inl"
#include "each_isa.h"

namespace kd {
namespace {

// Pixels of a channels_last level that are looked at twice, in the first caches.
constexpr int64_t TILE = 16;

const ComparedKernels& compared_kernels() { return chosen(scalar::kernels, avx2::kernels, avx512::kernels); }

struct Scratch {
  std::vector<float> s, t, made;
  std::vector<char> narrow;
};

Scratch& scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Elements from `place` on as fp32: in the buffer, or where they are.
const float* wide(const char* place, Type type, int64_t count, std::vector<float>& buffer) {
  if (type == Type::fp32) return reinterpret_cast<const float*>(place);
  row_kernels().widen[static_cast<int>(type)](place, sized(buffer, count), count);
  return buffer.data();
}

// The first pixel of each channel of a level's first image.
void first_values(const Level& level, float* out) {
  const int64_t count = level.last ? level.channels : 1, rows = level.last ? 1 : level.channels;
  for (int64_t row = 0; row < rows; ++row) {
    row_kernels().widen[static_cast<int>(level.type)](level.data + row * level.row_bytes(), out + row, count);
  }
}

void read_channels(const Level& s, const Level& t, const Band& band, Comparison kind, float k, const float* origins, float* part) {
  for (int64_t c = 0; c < s.channels; ++c) {
    ComparedRow a{};
    a.s = wide(place_of(s, band, c), s.type, band.pixels, scratch().s);
    a.t = wide(place_of(t, band, c), t.type, band.pixels, scratch().t);
    a.count = band.pixels;
    a.k = k, a.origin_s = origins[c], a.origin_t = origins[s.channels + c];
    a.numbers = part + c, a.apart = s.channels;
    compared_kernels().row[static_cast<int>(kind)](a);
  }
}

void read_pixels(const Level& s, const Level& t, const Band& band, Comparison kind, float k, const float* origins, float* part) {
  for (int64_t first = 0; first < band.pixels; first += TILE) {
    ComparedTile a{};
    a.pixels = std::min(TILE, band.pixels - first);
    a.row = a.count = a.apart = s.channels;
    a.s = wide(place_of(s, band, first), s.type, a.pixels * a.count, scratch().s);
    a.t = wide(place_of(t, band, first), t.type, a.pixels * a.count, scratch().t);
    a.before = first;
    a.k = k, a.origin_s = origins, a.origin_t = origins + s.channels;
    a.numbers = part;
    compared_kernels().tile[static_cast<int>(kind)](a);
  }
}

}  // namespace

ComparedParts::ComparedParts(const Pyramid& s, const Pyramid& t, Comparison kind, float k)
    : s_(s), bands_(s), numbers_(numbers_of(kind)), firsts_{0}, parts_(new_floats({0})) {
  for (size_t level = 0; level < s.size(); ++level) {
    firsts_.push_back(firsts_.back() + s.images() * bands_.of_image(level) * numbers_ * s[level].channels);
    origins_.emplace_back(2 * s[level].channels);
    if (kind != Comparison::correlation || s.images() == 0) continue;
    first_values(s[level], origins_.back().data());
    first_values(t[level], origins_.back().data() + s[level].channels);
  }
  parts_ = new_floats({firsts_.back()});
  for_each(bands_.count(), [&](int64_t i) {
    const Band band = bands_[i];
    const Level& own = s[band.level];
    float* const to = floats(parts_) + firsts_[band.level] + (i - bands_.first_of(band.level, 0)) * numbers_ * own.channels;
    (own.last ? read_pixels : read_channels)(own, t[band.level], band, kind, k, origins_[band.level].data(), to);
  });
}

const float* ComparedParts::part(size_t level, int64_t image) const {
  return floats(parts_) + firsts_[level] + image * bands_.of_image(level) * numbers_ * s_[level].channels;
}

void compared_gradient(const Pyramid& s, const Pyramid& t, const float* planes, int64_t apart, const std::vector<float>& by, float k,
                       bool correlation, const Results& out) {
  const Bands bands(s);
  const Places places(s);
  const RowsOut rows_out(s);
  for_each(bands.count(), [&](int64_t i) {
    const Band band = bands[i];
    const Level &own = s[band.level], &other = t[band.level];
    const int64_t rows = own.last ? band.pixels : own.channels, images = s.images();
    const int64_t first = correlation ? places.vector[band.level] / images : places.vector[band.level] + band.image * own.channels;
    ComparedSlopes a{};
    a.count = own.last ? own.channels : band.pixels;
    a.k = k, a.by = by[band.level * images + band.image];
    a.made = sized(scratch().made, a.count);
    for (int64_t row = 0; row < rows; ++row) {
      for (int plane = 0; plane < (correlation ? 5 : 4); ++plane) {
        a.planes[plane] = planes + plane * apart + first + (own.last ? 0 : row);
      }
      a.s = wide(place_of(own, band, row), own.type, a.count, scratch().s);
      a.t = wide(place_of(other, band, row), other.type, a.count, scratch().t);
      compared_kernels().slopes[correlation][!own.last](a);
      rows_out.put(place_of(out[band.level], band, row), own.type, a.made, a.count, scratch().narrow);
    }
    end_streams();
  });
}

}  // namespace kd
