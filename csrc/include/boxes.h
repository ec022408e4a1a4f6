// Boxes on the grids of a pyramid: what `box_mask` is asked for, and the cells of a box. Both backends compute these by the same functions,
// in fp32, the product before the quotient and without contraction, so that they cover the same cells.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "device.h"
#include "pyramid.h"

namespace kd {

// DeFeat's level 0 takes boxes below twice this edge, in pixels; every further level twice as much.
constexpr float FINEST_EDGE = 56.0f;

enum class Kind { gaussian, exponential, area, binary, assigned, background };

// width, height  of the image in pixels;   levels: of the pyramid
struct BoxOptions {
  Kind kind;
  float expand, width, height;
  int levels;
  bool released, inner_ones, area_norm;

  KD_BOTH bool profiled() const { return kind == Kind::gaussian || kind == Kind::exponential; }
  KD_BOTH bool windowed() const { return profiled() || kind == Kind::background; }
  KD_BOTH bool normed() const { return kind == Kind::area || (area_norm && windowed()); }
  // The box's own cells are 1: no profile is above that.
  KD_BOTH bool own_ones() const { return profiled() && inner_ones; }
};

// One axis of a box on a grid. Its window has the cells u with 0 <= u - start < length, all in fp32; the box's own cells are those of them
// with from <= u - start < to.
struct Axis {
  float start, length, from, to;
};

struct Window {
  Axis x, y;
  // The mask's highest value.
  float weight;
};

// NaN stays NaN.
KD_BOTH float clipped(float x, float end) { return x < 0 ? 0.0f : x > end ? end : x; }

// first, last: the box's first cell and its last one + 1, of `cells` cells.
KD_BOTH Axis axis_of(float first, float last, int64_t cells, const BoxOptions& options) {
  const float size = last - first;
  if (!options.windowed()) {
    const float length = options.kind == Kind::area ? size + 1 : size;
    return {first, length, 0, length};
  }
  const float length = floorf(sum(product(options.expand, size), 0.5f)), gap = floorf((length - size) / 2);
  const float start = options.released ? 2 * first - static_cast<float>(cells / 2) : first - gap;
  return {start, length, larger(gap, 0.0f), smaller(gap + size, length)};
}

// Whether a box of this area, in pixels, belongs to a level where each belongs to one.
KD_BOTH bool on_level(float area, int level, int levels) {
  int found = 0;
  float least = (2 * FINEST_EDGE) * (2 * FINEST_EDGE);
  for (; found + 1 < levels && area >= least; ++found) least *= 4;
  return found == level;
}

// Where a box (x1, y1, x2, y2) lies on a level of rows x columns; false where nothing of it is drawn.
KD_BOTH bool window_of(const BoxOptions& options, const float* box, int level, int64_t rows, int64_t columns, Window& window) {
  const float x1 = clipped(box[0], options.width), x2 = clipped(box[2], options.width);
  const float y1 = clipped(box[1], options.height), y2 = clipped(box[3], options.height);
  if (!(x2 > x1 && y2 > y1)) return false;
  const float across = static_cast<float>(columns), down = static_cast<float>(rows);
  const float left = floorf(product(x1, across) / options.width), top = floorf(product(y1, down) / options.height);
  float right = product(x2, across) / options.width, bottom = product(y2, down) / options.height;
  if (options.kind == Kind::assigned) {
    if (!on_level(product(x2 - x1, y2 - y1), level, options.levels)) return false;
    right = floorf(right), bottom = floorf(bottom);
    if (right <= left || bottom <= top) right = left + 1, bottom = top + 1;
  } else {
    right = ceilf(right), bottom = ceilf(bottom);
  }
  window.x = axis_of(left, right, columns, options);
  window.y = axis_of(top, bottom, rows, options);
  window.weight = options.normed() ? 1 / larger(product(window.x.length, window.y.length), 1.0f) : 1.0f;
  return true;
}

// A level's masks (N, H, W), and where they begin in the packed ones.
struct Grid {
  int64_t height, width, begin;
};

// The operator's arguments, checked: boxes (N, M, 4) fp32 and counts (N,) int32 or int64, both contiguous and on one device.
class BoxRequest {
 public:
  BoxRequest(const Tensor& boxes, const Tensor& counts, const std::vector<double>& image_size, const std::vector<int64_t>& sizes,
             const std::string& kind, double expand, bool released, bool inner_ones, bool area_norm)
      : held_(boxes), counts_(counts) {
    STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && type_of(boxes) == Type::fp32, "box_mask, boxes: expected (N, M, 4) fp32");
    STD_TORCH_CHECK(counts.dim() == 1 && counts.size(0) == boxes.size(0) && counts.device() == boxes.device(),
                    "box_mask, counts: expected (N,) on the device of the boxes");
    STD_TORCH_CHECK(image_size.size() == 2 && sizes.size() % 2 == 0,
                    "box_mask: expected image_size (height, width) and sizes H_0, W_0, H_1, W_1, ...");
    options_ = {kind_of(kind),
                static_cast<float>(expand),
                static_cast<float>(image_size[1]),
                static_cast<float>(image_size[0]),
                static_cast<int>(sizes.size() / 2),
                released,
                inner_ones,
                area_norm};
    for (size_t i = 0; i < sizes.size(); i += 2) {
      STD_TORCH_CHECK(sizes[i] >= 0 && sizes[i + 1] >= 0, "box_mask, level ", i / 2, ": a grid of ", sizes[i], " x ", sizes[i + 1],
                      " cells");
      grids_.push_back({sizes[i], sizes[i + 1], cells_});
      cells_ += images() * sizes[i] * sizes[i + 1];
    }
    using torch::headeronly::ScalarType;
    held_ = torch::stable::contiguous(boxes);
    const bool is_integer = counts.scalar_type() == ScalarType::Int || counts.scalar_type() == ScalarType::Long;
    counts_ = torch::stable::contiguous(is_integer ? counts : torch::stable::to(counts, ScalarType::Long));
  }

  const BoxOptions& options() const { return options_; }
  const std::vector<Grid>& grids() const { return grids_; }
  int64_t images() const { return held_.size(0); }
  // Boxes that there is room for in each image, and elements of the packed masks.
  int64_t most() const { return held_.size(1); }
  int64_t cells() const { return cells_; }
  const float* boxes() const { return static_cast<const float*>(held_.const_data_ptr()); }
  const Tensor& counts() const { return counts_; }

 private:
  static Kind kind_of(const std::string& name) {
    static const char* const names[] = {"gaussian", "exponential", "area", "binary", "assigned", "background"};
    const auto found = std::find(std::begin(names), std::end(names), name);
    STD_TORCH_CHECK(found != std::end(names), "box_mask: unknown kind '", name, "'");
    return static_cast<Kind>(found - std::begin(names));
  }

  BoxOptions options_;
  std::vector<Grid> grids_;
  Tensor held_, counts_;
  int64_t cells_ = 0;
};

}  // namespace kd
