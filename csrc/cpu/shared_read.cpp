// `shared_read`: attention and weighted channel sum of the same features, from one read of them.
#include <tuple>

#include "attention.h"

namespace kd {
namespace {

std::tuple<Tensor, Tensor, Tensor> shared_read(std::vector<Tensor> x, Tensor w, bool absolute, double temperature) {
  const Pyramid levels(x);
  const int64_t maps = levels.maps();
  const Tensor raw = new_floats({maps}), spatial = new_floats({maps});
  const Tensor channel = new_floats({levels.vectors()});
  Reading wanted;
  wanted.weights = floats(w, levels.vectors());
  wanted.absolute = absolute;
  wanted.raw = floats(raw);
  want_attention(wanted, spatial, channel);
  reduce(levels, wanted);
  attention_of_sums(levels, spatial, channel, temperature);
  return {raw, spatial, channel};
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { m.impl("shared_read", TORCH_BOX(&kd::shared_read)); }
