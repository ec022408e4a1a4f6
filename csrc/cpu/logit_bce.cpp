// `logit_bce`: binary cross-entropy of two networks' class logits.
#include "logits.h"

namespace kd {
namespace {

LogitDifference cross_entropy(double beta) {
  return {[beta](const LogitTile& tile) { return logit_kernels().cross_entropy(tile, static_cast<float>(beta)); }, 0};
}

Tensor logit_bce(std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight, double beta) {
  return logit_rows(s, t, weight, cross_entropy(beta));
}

std::vector<Tensor> logit_bce_backward(Tensor grad, std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight,
                                       double beta) {
  return logit_gradient(grad, s, t, weight, cross_entropy(beta));
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("logit_bce", TORCH_BOX(&kd::logit_bce));
  m.impl("logit_bce_backward", TORCH_BOX(&kd::logit_bce_backward));
}
