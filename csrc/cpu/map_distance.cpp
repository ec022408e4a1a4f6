// `map_distance`: distance of normalised maps, a piece of work a level and image.
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../include/pyramid.h"
#include "maps.h"
#include "parallel.h"

namespace kd {
namespace {

// The packed maps of both sides and what is to be done with them.
class Maps {
 public:
  const float *const student, *const teacher, *const spatial;
  const MapOptions options;

  Maps(const Tensor& m_s, const Tensor& m_t, const std::optional<Tensor>& factors, int64_t images, const std::vector<int64_t>& pixels,
       const std::string& normalize, const std::string& normalize_t, const std::string& distance, double eps, bool relative,
       double temperature, const std::string& average)
      : student(floats(m_s, elements(images, pixels))),
        teacher(floats(m_t, elements(images, pixels))),
        spatial(floats(factors, elements(images, pixels))),
        options{Rectify::none, normalize_of(normalize), normalize_of(normalize_t), distance_of(distance), static_cast<float>(eps), relative,
                static_cast<float>(temperature)},
        images_(images),
        pixels_(pixels) {
    int64_t end = 0;
    for (const int64_t count : pixels) {
      STD_TORCH_CHECK(count > 0, "a map without pixels");
      firsts_.push_back(end);
      divisors_.push_back(divisor_of(average, images, count));
      end += images * count;
    }
  }

  // Calls run(row, first, pixels, divisor) for each map: its place in the rows (L, N), where it begins and its size.
  template <class Run>
  void each(const Run& run) const {
    for_each(static_cast<int64_t>(pixels_.size()) * images_, [&](int64_t row) {
      const size_t level = row / images_;
      run(row, firsts_[level] + row % images_ * pixels_[level], pixels_[level], divisors_[level]);
    });
  }

  const float* spatial_from(int64_t first) const { return spatial != nullptr ? spatial + first : nullptr; }

 private:
  static int64_t elements(int64_t images, const std::vector<int64_t>& pixels) {
    return images * std::accumulate(pixels.begin(), pixels.end(), int64_t{0});
  }

  const int64_t images_;
  const std::vector<int64_t> pixels_;
  std::vector<int64_t> firsts_;
  std::vector<float> divisors_;
};

std::tuple<Tensor, Tensor> map_distance(Tensor m_s, Tensor m_t, std::optional<Tensor> spatial, int64_t images, std::vector<int64_t> pixels,
                                        std::string normalize, std::string normalize_t, std::string distance, double eps, bool relative,
                                        double temperature, std::string average) {
  const Maps maps(m_s, m_t, spatial, images, pixels, normalize, normalize_t, distance, eps, relative, temperature, average);
  const int64_t levels = static_cast<int64_t>(pixels.size());
  const Tensor rows = new_floats({levels, images}), states = new_floats({levels, images, STATE});
  float *const row_values = floats(rows), *const state = floats(states);
  maps.each([&](int64_t row, int64_t first, int64_t count, float divisor) {
    row_values[row] = map_kernels().map_forward(maps.student + first, maps.teacher + first, maps.spatial_from(first), state + row * STATE,
                                                count, divisor, maps.options);
  });
  return {rows, states};
}

Tensor map_distance_backward(Tensor m_s, Tensor m_t, std::optional<Tensor> spatial, Tensor state, Tensor grad, int64_t images,
                             std::vector<int64_t> pixels, std::string normalize, std::string normalize_t, std::string distance, double eps,
                             bool relative, double temperature, std::string average) {
  const Maps maps(m_s, m_t, spatial, images, pixels, normalize, normalize_t, distance, eps, relative, temperature, average);
  const Tensor result = torch::stable::empty_like(m_s);
  float* const out = floats(result);
  const int64_t rows = images * static_cast<int64_t>(pixels.size());
  const float *const states = floats(state, rows * STATE), *const cotangents = floats(grad, rows);
  maps.each([&](int64_t row, int64_t first, int64_t count, float divisor) {
    map_kernels().map_gradient(maps.student + first, maps.teacher + first, maps.spatial_from(first), states + row * STATE, cotangents[row],
                               count, divisor, maps.options, out + first);
  });
  return result;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("map_distance", TORCH_BOX(&kd::map_distance));
  m.impl("map_distance_backward", TORCH_BOX(&kd::map_distance_backward));
}
