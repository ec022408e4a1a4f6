// `logit_kl`: the divergence of two networks' logits, blocks of channels each a distribution.
#include "logits.h"

namespace kd {
namespace {

LogitDifference divergence(double temperature, int64_t groups) {
  return {[temperature](const LogitTile& tile) { return logit_kernels().divergence(tile, static_cast<float>(temperature)); }, groups};
}

Tensor logit_kl(std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight, double temperature, int64_t groups) {
  return logit_rows(s, t, weight, divergence(temperature, groups));
}

std::vector<Tensor> logit_kl_backward(Tensor grad, std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight,
                                      double temperature, int64_t groups) {
  return logit_gradient(grad, s, t, weight, divergence(temperature, groups));
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("logit_kl", TORCH_BOX(&kd::logit_kl));
  m.impl("logit_kl_backward", TORCH_BOX(&kd::logit_kl_backward));
}
