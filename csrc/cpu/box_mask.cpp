// `box_mask`: boxes rasterised onto the grids of a pyramid.
#include "box_mask.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../include/boxes.h"
#include "parallel.h"

#define KD_KERNELS "box_mask.inl"
#include "each_isa.h"

namespace kd {
namespace {

// Cells that one thread draws at a time: they stay in the first cache.
constexpr int64_t CELLS = 8192;

// Some rows of one image's mask.
struct Band {
  size_t level;
  int64_t image, first, rows;
};

Profile profile_of(Kind kind) {
  return kind == Kind::gaussian ? Profile::gaussian : kind == Kind::exponential ? Profile::exponential : Profile::ones;
}

Span whole(const Axis& axis) { return {axis.start, 0, axis.length, axis.length}; }
Span own(const Axis& axis) { return {axis.start, axis.from, axis.to, axis.length}; }

// The cells of first..end - 1 that a span may have.
std::pair<int64_t, int64_t> cells_of(const Span& span, int64_t first, int64_t end) {
  // Beyond, and for NaN, where a span begins and ends is left to the kernel.
  constexpr float WHOLE_NUMBERS = 1 << 23;
  if (!(std::abs(span.start) < WHOLE_NUMBERS && span.to < WHOLE_NUMBERS)) return {first, end};
  return {std::max(first, static_cast<int64_t>(span.start + span.from)), std::min(end, static_cast<int64_t>(span.start + span.to))};
}

int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// A band while boxes are drawn on it; its rows are whole vectors long.
class Canvas {
 public:
  Canvas(const Band& band, int64_t width)
      : band_(band), width_(width), stride_(whole_vectors(width)), mask_(stride_ * band.rows), x_(stride_), y_(whole_vectors(band.rows)) {}

  const float* row(int64_t row) const { return mask_.data() + row * stride_; }

  // The maximum of what there is and weight times the product of two profiles.
  void raise(const Span& x, const Span& y, Profile profile, float weight) {
    const auto [top, bottom] = cells_of(y, band_.first, band_.first + band_.rows);
    const auto [left, right] = cells_of(x, 0, width_);
    if (top >= bottom || left >= right) return;
    const int64_t first = left / LANES * LANES, columns = whole_vectors(right - first);
    const auto fill = kernels_.profile[static_cast<int>(profile)];
    fill(x, 1.0f, first, columns, x_.data());
    fill(y, weight, top, bottom - top, y_.data());
    kernels_.raise(mask_.data() + (top - band_.first) * stride_ + first, stride_, y_.data(), bottom - top, x_.data(), columns);
  }

 private:
  const BoxMaskKernels& kernels_ = chosen(scalar::kernels, avx2::kernels, avx512::kernels);
  const Band& band_;
  int64_t width_, stride_;
  std::vector<float> mask_, x_, y_;
};

class Rasteriser {
 public:
  Rasteriser(const BoxRequest& request, float* masks)
      : request_(request), options_(request.options()), grids_(request.grids()), masks_(masks) {}

  // counts: (N,), of which those beyond the boxes that there is room for count no more than these
  void run(const int64_t* counts) const {
    const int64_t images = request_.images(), most = request_.most();
    std::vector<Band> bands;
    for (size_t level = 0; level < grids_.size(); ++level) {
      const int64_t height = grids_[level].height, most_rows = std::max<int64_t>(1, CELLS / std::max<int64_t>(1, grids_[level].width));
      for (int64_t image = 0; image < images; ++image) {
        for (int64_t first = 0; first < height; first += most_rows) {
          bands.push_back({level, image, first, std::min(most_rows, height - first)});
        }
      }
    }
    const int64_t count = static_cast<int64_t>(bands.size());
    std::vector<int64_t> empty(count);
    for_each(count, [&](int64_t i) {
      const int64_t image = bands[i].image;
      empty[i] = draw(bands[i], request_.boxes() + image * most * 4, std::min(counts[image], most));
    });
    if (options_.kind != Kind::background) return;
    std::vector<int64_t> of_image(grids_.size() * images);
    for (int64_t i = 0; i < count; ++i) of_image[bands[i].level * images + bands[i].image] += empty[i];
    for_each(count, [&](int64_t i) {
      const float share = 1.0f / static_cast<float>(std::max<int64_t>(1, of_image[bands[i].level * images + bands[i].image]));
      float* const mask = place(bands[i]);
      for (int64_t cell = 0; cell < bands[i].rows * grids_[bands[i].level].width; ++cell) mask[cell] *= share;
    });
  }

 private:
  float* place(const Band& band) const {
    const Grid& grid = grids_[band.level];
    return masks_ + grid.begin + (band.image * grid.height + band.first) * grid.width;
  }

  // Draws the boxes of one image. Of the background it marks the cells that no box reaches by 1, and returns their number.
  int64_t draw(const Band& band, const float* boxes, int64_t count) const {
    const int64_t width = grids_[band.level].width;
    Canvas canvas(band, width);
    for (int64_t i = 0; i < count; ++i) draw_box(canvas, band.level, boxes + i * 4);
    float* out = place(band);
    int64_t empty = 0;
    for (int64_t row = 0; row < band.rows; ++row, out += width) {
      const float* from = canvas.row(row);
      if (options_.kind != Kind::background) {
        std::copy_n(from, width, out);
        continue;
      }
      for (int64_t u = 0; u < width; ++u) {
        out[u] = from[u] == 0 ? 1.0f : 0.0f;
        empty += from[u] == 0;
      }
    }
    return empty;
  }

  void draw_box(Canvas& canvas, size_t level, const float* box) const {
    Window window;
    if (!window_of(options_, box, static_cast<int>(level), grids_[level].height, grids_[level].width, window)) return;
    canvas.raise(whole(window.x), whole(window.y), profile_of(options_.kind), window.weight);
    if (options_.own_ones()) canvas.raise(own(window.x), own(window.y), Profile::ones, window.weight);
  }

  const BoxRequest& request_;
  const BoxOptions& options_;
  const std::vector<Grid>& grids_;
  float* masks_;
};

Tensor box_mask(Tensor boxes, Tensor counts, std::vector<double> image_size, std::vector<int64_t> sizes, std::string kind, double expand,
                bool released, bool inner_ones, bool area_norm) {
  const BoxRequest request(boxes, counts, image_size, sizes, kind, expand, released, inner_ones, area_norm);
  const Tensor masks = new_floats({request.cells()});
  if (request.cells() == 0) return masks;
  const Tensor numbers = torch::stable::to(request.counts(), torch::headeronly::ScalarType::Long);
  Rasteriser(request, floats(masks)).run(static_cast<const int64_t*>(numbers.const_data_ptr()));
  return masks;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { m.impl("box_mask", TORCH_BOX(&kd::box_mask)); }
