// `weighted_channel_sum`: the maps before they are rectified.
#include "gradient.h"
#include "packed_maps.h"
#include "reduce.h"

namespace kd {
namespace {

Tensor weighted_channel_sum(std::vector<Tensor> x, Tensor w, bool absolute) {
  const Pyramid levels(x);
  const Tensor raw = new_floats({levels.maps()});
  Reading wanted;
  wanted.weights = floats(w, levels.vectors());
  wanted.absolute = absolute;
  wanted.raw = floats(raw);
  reduce(levels, wanted);
  return raw;
}

std::vector<Tensor> weighted_channel_sum_backward(std::vector<Tensor> x, Tensor w, Tensor grad, bool absolute) {
  const Pyramid levels(x);
  Results out(x, levels);
  Writing wanted;
  wanted.has_product = wanted.product_by_pixel = true;
  wanted.product_channel = floats(w, levels.vectors());
  wanted.absolute = absolute;
  const PackedMaps maps(floats(grad, levels.maps()), levels);
  gradient(levels, wanted, out, [&](const Band& band, const PixelFactors& pixel) { maps.copy(band, pixel.product); });
  return out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("weighted_channel_sum", TORCH_BOX(&kd::weighted_channel_sum));
  m.impl("weighted_channel_sum_backward", TORCH_BOX(&kd::weighted_channel_sum_backward));
}
