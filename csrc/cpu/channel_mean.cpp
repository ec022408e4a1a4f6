// `channel_mean`: the spatial mean of x or of |x|.
#include "gradient.h"
#include "reduce.h"

namespace kd {
namespace {

Tensor channel_mean(std::vector<Tensor> x, bool absolute) {
  const Pyramid levels(x);
  const Tensor means = new_floats({levels.vectors()});
  Reading wanted;
  wanted.sums = absolute ? ChannelSums::of_magnitudes : ChannelSums::of_values;
  wanted.channel = floats(means);
  reduce(levels, wanted);
  float* mean = wanted.channel;
  for (size_t level = 0; level < levels.size(); ++level) {
    const float pixels = static_cast<float>(levels[level].pixels);
    for (int64_t i = 0; i < levels.images() * levels[level].channels; ++i, ++mean) *mean /= pixels;
  }
  return means;
}

std::vector<Tensor> channel_mean_backward(std::vector<Tensor> x, Tensor grad, bool absolute) {
  const Pyramid levels(x);
  Results out(x, levels);
  const Tensor shares = new_floats({levels.vectors()});
  const float* from = floats(grad, levels.vectors());
  float* share = floats(shares);
  for (size_t level = 0; level < levels.size(); ++level) {
    const float pixels = static_cast<float>(levels[level].pixels);
    for (int64_t i = 0; i < levels.images() * levels[level].channels; ++i) *share++ = *from++ / pixels;
  }
  Writing wanted;
  wanted.has_product = true;
  wanted.product_channel = floats(shares);
  wanted.absolute = absolute;
  gradient(levels, wanted, out, nullptr);
  return out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("channel_mean", TORCH_BOX(&kd::channel_mean));
  m.impl("channel_mean_backward", TORCH_BOX(&kd::channel_mean_backward));
}
