#include "gradient.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "row_access.h"

namespace kd {
namespace {

// Elements of which the fp32 sums of `values` are made at a time.
constexpr int64_t SUMMED = 4096;

// What a thread needs for one band.
struct Scratch {
  std::vector<float> product, sign, error, made, x, target, arriving;
  std::vector<char> narrow;
};

class Writer {
 public:
  Writer(const Pyramid& x, const Writing& wanted, const Results& out)
      : x_(x), wanted_(wanted), out_(out), places_(x), bands_(x), rows_(row_kernels()), rows_out_(x) {
    if (wanted.values != nullptr) values_.resize(bands_.count());
  }

  void run(const PixelsOf& by_pixel, Images images) {
    const int64_t first = bands_.before(images.first);
    for_each(bands_.before(images.last) - first, [&](int64_t i) {
      thread_local Scratch scratch;
      const Band band = bands_[first + i];
      write(band, scratch, by_pixel);
      end_streams();
    });
    if (wanted_.values == nullptr) return;
    for (int64_t place = images.first; place < images.last; ++place) {
      const auto begin = values_.begin() + bands_.before(place);
      const double total = std::accumulate(begin, begin + bands_.of_image(place / x_.images()), 0.0);
      wanted_.values[place] = static_cast<float>(0.5 * total);
    }
  }

 private:
  void write(const Band& band, Scratch& scratch, const PixelsOf& by_pixel) {
    const Level& x = x_[band.level];
    const Level* target = wanted_.has_error ? &(*wanted_.target)[band.level] : nullptr;
    const Level* arriving = wanted_.arriving != nullptr ? &(*wanted_.arriving)[band.level] : nullptr;
    const bool mixed = (target != nullptr && target->type != x.type) || (arriving != nullptr && arriving->type != x.type);
    const int type = static_cast<int>(mixed ? Type::fp32 : x.type);
    const int64_t outer = x.last ? band.pixels : x.channels, count = x.last ? x.channels : band.pixels;
    const PixelFactors pixel = {
        wanted_.has_product && wanted_.product_by_pixel ? sized(scratch.product, band.pixels) : nullptr,
        wanted_.has_sign && wanted_.sign_by_pixel ? sized(scratch.sign, band.pixels) : nullptr,
        wanted_.has_error && wanted_.error_by_pixel ? sized(scratch.error, band.pixels) : nullptr,
    };
    if (by_pixel) by_pixel(band, pixel);
    const int64_t vector = places_.vector[band.level] + band.image * x.channels;
    const auto of_channels = [&](const float* all) { return all != nullptr ? all + vector : nullptr; };
    const float* by_channel[3] = {of_channels(wanted_.product_channel), of_channels(wanted_.sign_channel),
                                  of_channels(wanted_.error_channel)};
    const float* by_place[3] = {pixel.product, pixel.sign, pixel.error};
    // Along a row run pixels or, in channels_last, channels.
    const float* const* along = x.last ? by_channel : by_place;
    const float* const* of_row = x.last ? by_place : by_channel;
    const bool reads = wanted_.has_sign || wanted_.has_error || wanted_.absolute;
    float lanes[LANES] = {};
    double values = 0;
    int64_t summed = 0;
    Gradient a{};
    a.count = count;
    a.ahead = x.row_bytes();
    a.product = along[0], a.sign = along[1], a.error = along[2];
    a.has_product = wanted_.has_product, a.has_sign = wanted_.has_sign, a.has_error = wanted_.has_error;
    a.absolute = wanted_.absolute;
    a.values = wanted_.values != nullptr ? lanes : nullptr;
    a.made = sized(scratch.made, count);
    for (int64_t row = 0; row < outer; ++row) {
      a.x = reads ? place_of(x, band, row) : nullptr;
      a.target = target != nullptr ? place_of(*target, band, row) : nullptr;
      a.arriving = arriving != nullptr ? place_of(*arriving, band, row) : nullptr;
      if (mixed) {
        a.x = widened(a.x, x, scratch.x, count);
        if (target != nullptr) a.target = widened(a.target, *target, scratch.target, count);
        if (arriving != nullptr) a.arriving = widened(a.arriving, *arriving, scratch.arriving, count);
      }
      a.by_product = of_row[0] != nullptr ? of_row[0][row] : 1.0f;
      a.by_sign = of_row[1] != nullptr ? of_row[1][row] : 0.0f;
      a.by_error = of_row[2] != nullptr ? of_row[2][row] : 1.0f;
      rows_.gradient[type](a);
      rows_out_.put(place_of(out_[band.level], band, row), x.type, a.made, count, scratch.narrow);
      summed += count;
      if (a.values != nullptr && (summed >= SUMMED || row + 1 == outer)) {
        values = std::accumulate(lanes, lanes + LANES, values);
        std::fill_n(lanes, LANES, 0.0f);
        summed = 0;
      }
    }
    if (a.values != nullptr) values_[band.index] = values;
  }

  const char* widened(const char* row, const Level& level, std::vector<float>& buffer, int64_t count) const {
    if (row == nullptr) return nullptr;
    rows_.widen[static_cast<int>(level.type)](row, sized(buffer, count), count);
    return reinterpret_cast<const char*>(buffer.data());
  }

  const Pyramid& x_;
  const Writing& wanted_;
  const Results& out_;
  const Places places_;
  const Bands bands_;
  const RowKernels& rows_;
  const RowsOut rows_out_;
  std::vector<double> values_;
};

}  // namespace

void gradient(const Pyramid& x, const Writing& wanted, const Results& out, const PixelsOf& by_pixel, Images images) {
  Writer(x, wanted, out).run(by_pixel, images);
}

}  // namespace kd
