// `spatial_pool`: the weights that a map gives its pixels, and the means under them.
#include <numeric>
#include <vector>

#include "maps.h"
#include "parallel.h"
#include "reduce.h"

namespace kd {
namespace {

// Calls run(first, count) for each of the packed maps of these levels: where it begins and its pixels.
template <class Run>
void for_each_map(int64_t images, const std::vector<int64_t>& pixels, const Run& run) {
  std::vector<int64_t> firsts{0};
  for (const int64_t count : pixels) firsts.push_back(firsts.back() + images * count);
  for_each(images * static_cast<int64_t>(pixels.size()), [&](int64_t i) {
    const int64_t level = i / images;
    run(firsts[level] + i % images * pixels[level], pixels[level]);
  });
}

int64_t elements_of(int64_t images, const std::vector<int64_t>& pixels) {
  return images * std::accumulate(pixels.begin(), pixels.end(), int64_t{0});
}

Tensor pool_weights(Tensor a, int64_t images, std::vector<int64_t> pixels, bool softmax) {
  const float* const from = floats(a, elements_of(images, pixels));
  const Tensor weights = torch::stable::empty_like(a);
  float* const to = floats(weights);
  for_each_map(images, pixels, [&](int64_t first, int64_t count) { map_kernels().pool_weights(from + first, to + first, count, softmax); });
  return weights;
}

Tensor pool_weights_backward(Tensor weights, Tensor grad, Tensor a, int64_t images, std::vector<int64_t> pixels, bool softmax) {
  const int64_t count = elements_of(images, pixels);
  const float *const own = floats(weights, count), *const of_weights = floats(grad, count), *const from = floats(a, count);
  const Tensor result = torch::stable::empty_like(a);
  float* const to = floats(result);
  for_each_map(images, pixels, [&](int64_t first, int64_t size) {
    map_kernels().pool_weights_backward(own + first, of_weights + first, from + first, to + first, size, softmax);
  });
  return result;
}

Tensor spatial_pool(std::vector<Tensor> x, Tensor weights) {
  const Pyramid levels(x);
  const Tensor means = new_floats({levels.vectors()});
  Reading wanted;
  wanted.sums = ChannelSums::of_values;
  wanted.pixel_weights = floats(weights, levels.maps());
  wanted.channel = floats(means);
  reduce(levels, wanted);
  return means;
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("pool_weights", TORCH_BOX(&kd::pool_weights));
  m.impl("pool_weights_backward", TORCH_BOX(&kd::pool_weights_backward));
  m.impl("spatial_pool", TORCH_BOX(&kd::spatial_pool));
}
