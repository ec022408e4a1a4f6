// `map_distance` on CUDA: distance of normalised maps, a block a level and image, and its gradient, pixel by pixel.
#include <string>
#include <tuple>

#include "launch.h"
#include "levels.h"
#include "maps.h"

namespace kd {
namespace {

// The maps of a level.
//   map, row       where it begins in packed maps (N, P) and in rows, a level and image each
//   first, blocks  its first block, and its blocks for one image
struct MapLevel {
  int64_t pixels, map, row, first, blocks;
  float divisor;
};

// The maps of one launch and what is to be done with them. spatial may be null.
struct Maps {
  PlacesOf<MapLevel> places;
  const float *student, *teacher, *spatial;
  MapOptions options;
};

// What a block works on: a tile of both maps of a level and image.
struct MapTile {
  const float *student, *teacher, *spatial;
  int64_t first, pixels, row, tile;
  float divisor;

  KD_DEVICE MapTile(const Maps& maps, int64_t block) {
    const MapLevel& level = maps.places.place[maps.places.of(block)];
    const int64_t within = block - level.first, n = within / level.blocks;
    first = level.map + n * level.pixels, pixels = level.pixels, row = level.row + n, tile = within % level.blocks;
    student = maps.student + first, teacher = maps.teacher + first;
    spatial = maps.spatial != nullptr ? maps.spatial + first : nullptr;
    divisor = level.divisor;
  }
};

struct MapDistance {
  static constexpr int kThreads = kMapThreads, kResident = 1;
  using Shared = MapScratch;

  Maps maps;
  float *rows, *states;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& scratch) const {
    const MapTile at(maps, me.block());
    const float value = map_forward(me, scratch, at.student, at.teacher, at.spatial, states + at.row * STATE, at.pixels, at.divisor,
                                    maps.options);
    if (me.index() == 0) rows[at.row] = value;
  }
};

// A pixel a thread.
struct MapDistanceBackward {
  static constexpr int kThreads = 256, kResident = 4;
  struct Shared {};

  Maps maps;
  const float *states, *grad;
  float* out;

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared&) const {
    const MapTile at(maps, me.block());
    const int64_t p = at.tile * kThreads + me.index();
    if (p >= at.pixels) return;
    const float* const state = states + at.row * STATE;
    out[at.first + p] = map_gradient(at.student, at.teacher, at.spatial, state, grad[at.row], p, at.divisor, maps.options);
  }
};

// The arguments of both operators.
class Call {
 public:
  Call(const Tensor& m_s, const Tensor& m_t, const std::optional<Tensor>& spatial, int64_t images, const std::vector<int64_t>& pixels,
       const std::string& normalize, const std::string& normalize_t, const std::string& distance, double eps, bool relative,
       double temperature, const std::string& average)
      : images_(images) {
    int64_t elements = 0, row = 0;
    for (const int64_t count : pixels) {
      STD_TORCH_CHECK(count > 0, "a map without pixels");
      levels_.push_back({count, elements, row, 0, 1, divisor_of(average, images, count)});
      elements += images * count;
      row += images;
    }
    maps_.student = floats_beside(m_s, m_s, elements);
    maps_.teacher = floats_beside(m_s, m_t, elements);
    maps_.spatial = floats_beside(m_s, spatial, elements);
    maps_.options = {Rectify::none, normalize_of(normalize), normalize_of(normalize_t), distance_of(distance), static_cast<float>(eps),
                     relative, static_cast<float>(temperature)};
  }

  // Calls run(maps) for the levels, as `in_launches` does, with a block for each map.
  template <class Run>
  void each(const Run& run) const {
    in_launches(images_, levels_, [&](const PlacesOf<MapLevel>& places) {
      Maps maps = maps_;
      maps.places = places;
      run(maps);
    });
  }

  // The same with a block for every `tile` pixels.
  template <class Run>
  void each(int64_t tile, const Run& run) {
    for (MapLevel& level : levels_) level.blocks = ceil_div(level.pixels, tile);
    each(run);
  }

 private:
  const int64_t images_;
  std::vector<MapLevel> levels_;
  Maps maps_{};
};

std::tuple<Tensor, Tensor> map_distance(Tensor m_s, Tensor m_t, std::optional<Tensor> spatial, int64_t images, std::vector<int64_t> pixels,
                                        std::string normalize, std::string normalize_t, std::string distance, double eps, bool relative,
                                        double temperature, std::string average) {
  const OnDeviceOf device(m_s);
  Call call(m_s, m_t, spatial, images, pixels, normalize, normalize_t, distance, eps, relative, temperature, average);
  const int64_t levels = static_cast<int64_t>(pixels.size());
  const Tensor rows = new_floats(m_s, {levels, images}), states = new_floats(m_s, {levels, images, STATE});
  call.each([&](const Maps& maps) { device.launch(MapDistance{maps, floats(rows), floats(states)}, maps.places.blocks()); });
  return {rows, states};
}

Tensor map_distance_backward(Tensor m_s, Tensor m_t, std::optional<Tensor> spatial, Tensor state, Tensor grad, int64_t images,
                             std::vector<int64_t> pixels, std::string normalize, std::string normalize_t, std::string distance, double eps,
                             bool relative, double temperature, std::string average) {
  const OnDeviceOf device(m_s);
  Call call(m_s, m_t, spatial, images, pixels, normalize, normalize_t, distance, eps, relative, temperature, average);
  const int64_t rows = images * static_cast<int64_t>(pixels.size());
  const float *const states = floats_beside(m_s, state, rows * STATE), *const cotangents = floats_beside(m_s, grad, rows);
  const Tensor result = torch::stable::empty_like(m_s);
  call.each(MapDistanceBackward::kThreads, [&](const Maps& maps) {
    device.launch(MapDistanceBackward{maps, states, cotangents, floats(result)}, maps.places.blocks());
  });
  return result;
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("map_distance", TORCH_BOX(&kd::map_distance));
  m.impl("map_distance_backward", TORCH_BOX(&kd::map_distance_backward));
}
