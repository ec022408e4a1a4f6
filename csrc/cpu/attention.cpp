// `attention`: spatial and channel attention of the sums of |x| that the read pass leaves.
#include "attention.h"

#include <tuple>

#include "gradient.h"
#include "maps.h"
#include "packed_maps.h"
#include "parallel.h"

namespace kd {
namespace {

// Calls run(first, count, factor, channels) for the map and for the vector of each level and image: where its numbers begin in the packed
// maps or vectors, how many there are, its `logit_factor`, and whether it is the vector.
template <class Run>
void for_each_attention(const Pyramid& x, double temperature, const Run& run) {
  const Places places(x);
  for_each(2 * static_cast<int64_t>(x.size()) * x.images(), [&](int64_t i) {
    const int64_t image = i / 2 % x.images();
    const size_t level = i / 2 / x.images();
    const int64_t channels = x[level].channels, pixels = x[level].pixels;
    if (i % 2 == 0) {
      run(places.map[level] + image * pixels, pixels, logit_factor(channels, temperature), false);
    } else {
      run(places.vector[level] + image * channels, channels, logit_factor(pixels, temperature), true);
    }
  });
}

std::tuple<Tensor, Tensor> attention(std::vector<Tensor> x, double temperature) {
  const Pyramid levels(x);
  const Tensor spatial = new_floats({levels.maps()});
  const Tensor channel = new_floats({levels.vectors()});
  Reading wanted;
  want_attention(wanted, spatial, channel);
  reduce(levels, wanted);
  attention_of_sums(levels, spatial, channel, temperature);
  return {spatial, channel};
}

std::vector<Tensor> attention_backward(std::vector<Tensor> x, Tensor spatial, Tensor channel, Tensor grad_spatial, Tensor grad_channel,
                                       double temperature) {
  const Pyramid levels(x);
  Results out(x, levels);
  const Tensor of_pixel = new_floats({levels.maps()}), of_channel = new_floats({levels.vectors()});
  const int64_t maps = levels.maps(), vectors = levels.vectors();
  const float* const own[] = {floats(spatial, maps), floats(channel, vectors)};
  const float* const grad[] = {floats(grad_spatial, maps), floats(grad_channel, vectors)};
  float* const result[] = {floats(of_pixel), floats(of_channel)};
  for_each_attention(levels, temperature, [&](int64_t first, int64_t count, float factor, bool channels) {
    map_kernels().attention_backward(own[channels] + first, grad[channels] + first, result[channels] + first, count, factor);
  });
  Writing wanted;
  wanted.has_sign = wanted.sign_by_pixel = true;
  wanted.sign_channel = floats(of_channel);
  const PackedMaps packed(floats(of_pixel), levels);
  gradient(levels, wanted, out, [&](const Band& band, const PixelFactors& pixel) { packed.copy(band, pixel.sign); });
  return out.finish();
}

}  // namespace

void want_attention(Reading& wanted, const Tensor& spatial, const Tensor& channel) {
  wanted.magnitude = floats(spatial);
  wanted.sums = ChannelSums::of_magnitudes;
  wanted.channel = floats(channel);
}

void attention_of_sums(const Pyramid& x, const Tensor& spatial, const Tensor& channel, double temperature) {
  float* const sums[] = {floats(spatial), floats(channel)};
  for_each_attention(x, temperature, [&](int64_t first, int64_t count, float factor, bool channels) {
    map_kernels().attention(sums[channels] + first, sums[channels] + first, count, factor);
  });
}

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&kd::attention));
  m.impl("attention_backward", TORCH_BOX(&kd::attention_backward));
}
