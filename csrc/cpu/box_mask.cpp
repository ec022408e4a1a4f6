// `box_mask`: boxes rasterised onto the grids of a pyramid. Box arithmetic is fp32, the product before the quotient, so that every backend
// covers the same cells.
#include "box_mask.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "../include/pyramid.h"
#include "parallel.h"

#define KD_KERNELS "box_mask.inl"
#include "each_isa.h"

namespace kd {
namespace {

// Cells that one thread draws at a time: they stay in the first cache.
constexpr int64_t CELLS = 8192;
// DeFeat's level 0 takes boxes below twice this edge, in pixels; every further level twice as much.
constexpr float FINEST_EDGE = 56.0f;

enum class Kind { gaussian, exponential, area, binary, assigned, background };

Kind kind_of(const std::string& name) {
  static const char* const names[] = {"gaussian", "exponential", "area", "binary", "assigned", "background"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "unknown kind '", name, "' of a box mask");
  return static_cast<Kind>(found - std::begin(names));
}

struct Options {
  Kind kind;
  float expand;
  bool released, inner_ones, area_norm;

  bool profiled() const { return kind == Kind::gaussian || kind == Kind::exponential; }
  bool windowed() const { return profiled() || kind == Kind::background; }
  bool normed() const { return kind == Kind::area || (area_norm && windowed()); }
  Profile profile() const {
    return kind == Kind::gaussian ? Profile::gaussian : kind == Kind::exponential ? Profile::exponential : Profile::ones;
  }
};

// A level's masks (N, H, W).
struct Grid {
  int64_t height, width;
  float* masks;
};

// Some rows of one image's mask.
struct Band {
  size_t level;
  int64_t image, first, rows;
};

// One axis of a box on a grid: its window and, within that, its own cells.
struct Axis {
  Span window, own;
};

Axis axis_of(float first, float last, int64_t cells, const Options& options) {
  const float size = last - first;
  if (!options.windowed()) {
    const float length = options.kind == Kind::area ? size + 1 : size;
    const Span span = {first, 0, length, length};
    return {span, span};
  }
  const float length = std::floor(options.expand * size + 0.5f);
  const float gap = std::floor((length - size) / 2);
  const float start = options.released ? 2 * first - static_cast<float>(cells / 2) : first - gap;
  return {{start, 0, length, length}, {start, std::max(gap, 0.0f), std::min(length, gap + size), length}};
}

// The cells of first..end - 1 that a span may have.
std::pair<int64_t, int64_t> cells_of(const Span& span, int64_t first, int64_t end) {
  // Beyond, and for NaN, where a span begins and ends is left to the kernel.
  constexpr float WHOLE_NUMBERS = 1 << 23;
  if (!(std::abs(span.start) < WHOLE_NUMBERS && span.to < WHOLE_NUMBERS)) return {first, end};
  return {std::max(first, static_cast<int64_t>(span.start + span.from)), std::min(end, static_cast<int64_t>(span.start + span.to))};
}

int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// NaN stays NaN.
float clipped(float x, float end) { return x < 0 ? 0 : x > end ? end : x; }

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
  // extent: (width, height) of the image in pixels
  Rasteriser(std::vector<Grid> grids, const float (&extent)[2], const Options& options)
      : grids_(std::move(grids)), width_(extent[0]), height_(extent[1]), options_(options) {}

  // boxes: (N, most, 4);   counts: (N,), of which at most `most` count
  void run(const float* boxes, const int64_t* counts, int64_t images, int64_t most) const {
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
      empty[i] = draw(bands[i], boxes + image * most * 4, std::min(counts[image], most));
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
    return grid.masks + (band.image * grid.height + band.first) * grid.width;
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
    const float x1 = clipped(box[0], width_), x2 = clipped(box[2], width_);
    const float y1 = clipped(box[1], height_), y2 = clipped(box[3], height_);
    if (!(x2 > x1 && y2 > y1)) return;
    const Grid& grid = grids_[level];
    const float columns = static_cast<float>(grid.width), rows = static_cast<float>(grid.height);
    const float left = std::floor(x1 * columns / width_), top = std::floor(y1 * rows / height_);
    float right = x2 * columns / width_, bottom = y2 * rows / height_;
    if (options_.kind == Kind::assigned) {
      if (level_of((x2 - x1) * (y2 - y1)) != level) return;
      right = std::floor(right), bottom = std::floor(bottom);
      if (right <= left || bottom <= top) right = left + 1, bottom = top + 1;
    } else {
      right = std::ceil(right), bottom = std::ceil(bottom);
    }
    const Axis x = axis_of(left, right, grid.width, options_), y = axis_of(top, bottom, grid.height, options_);
    const float weight = options_.normed() ? 1 / std::max(x.window.length * y.window.length, 1.0f) : 1.0f;
    canvas.raise(x.window, y.window, options_.profile(), weight);
    // No profile is above 1.
    if (options_.inner_ones && options_.profiled()) canvas.raise(x.own, y.own, Profile::ones, weight);
  }

  // The one level of a box of this area, in pixels.
  size_t level_of(float area) const {
    size_t level = 0;
    float least = (2 * FINEST_EDGE) * (2 * FINEST_EDGE);
    for (; level + 1 < grids_.size() && area >= least; ++level) least *= 4;
    return level;
  }

  std::vector<Grid> grids_;
  float width_, height_;
  Options options_;
};

Tensor box_mask(Tensor boxes, Tensor counts, std::vector<double> image_size, std::vector<int64_t> sizes, std::string kind, double expand,
                bool released, bool inner_ones, bool area_norm) {
  STD_TORCH_CHECK(boxes.is_cpu() && boxes.dim() == 3 && boxes.size(2) == 4 && type_of(boxes) == Type::fp32,
                  "boxes: expected (N, M, 4) fp32 on the CPU");
  const int64_t images = boxes.size(0), most = boxes.size(1);
  STD_TORCH_CHECK(counts.is_cpu() && counts.dim() == 1 && counts.size(0) == images, "counts: expected (N,) on the CPU");
  STD_TORCH_CHECK(image_size.size() == 2 && sizes.size() % 2 == 0, "expected image_size (height, width) and sizes H_0, W_0, H_1, W_1, ...");
  const Options options = {kind_of(kind), static_cast<float>(expand), released, inner_ones, area_norm};

  int64_t cells = 0;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    STD_TORCH_CHECK(sizes[i] >= 0 && sizes[i + 1] >= 0, "level ", i / 2, ": a grid of ", sizes[i], " x ", sizes[i + 1], " cells");
    cells += images * sizes[i] * sizes[i + 1];
  }
  const Tensor masks = new_floats({cells});
  if (cells == 0) return masks;
  std::vector<Grid> grids;
  float* mask = floats(masks);
  for (size_t i = 0; i < sizes.size(); i += 2) {
    grids.push_back({sizes[i], sizes[i + 1], mask});
    mask += images * sizes[i] * sizes[i + 1];
  }
  const Tensor dense = torch::stable::contiguous(boxes);
  const Tensor numbers = torch::stable::contiguous(torch::stable::to(counts, torch::headeronly::ScalarType::Long));
  const float extent[] = {static_cast<float>(image_size[1]), static_cast<float>(image_size[0])};
  Rasteriser(std::move(grids), extent, options).run(floats(dense), static_cast<const int64_t*>(numbers.const_data_ptr()), images, most);
  return masks;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { m.impl("box_mask", TORCH_BOX(&kd::box_mask)); }
