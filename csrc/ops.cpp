// The operators and their schemas: those of kdkernels/ops without the backend's name. csrc/cpu and csrc/cuda implement them.
#include <torch/csrc/stable/library.h>

#define KD_OPERANDS                                                                                                       \
  "Tensor[] t, Tensor? weights, Tensor? map_t, Tensor? map_spatial, Tensor? attention_spatial, Tensor? attention_channel, " \
  "Tensor? channel, Tensor[] spatial, Tensor? factors"
#define KD_OPTIONS                                                                                                            \
  "bool absolute, str rectify, str normalize, str normalize_t, str distance, float eps, bool relative, float map_temperature, " \
  "str average, float temperature, int imitations, float[] scales"
#define KD_MAP_OPTIONS                                                                                                          \
  "int images, int[] pixels, str normalize, str normalize_t, str distance, float eps, bool relative, float temperature, " \
  "str average"

// The emulator of the tests has the same operators under a name of its own.
#ifndef KD_LIBRARY
#define KD_LIBRARY kdkernels_native
#endif
#define KD_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)

KD_DEFINE(KD_LIBRARY, m) {
  m.def("attention(Tensor[] x, float temperature) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor[] x, Tensor spatial, Tensor channel, Tensor grad_spatial, Tensor grad_channel, float temperature) -> "
      "Tensor[]");
  m.def(
      "box_mask(Tensor boxes, Tensor counts, float[] image_size, int[] sizes, str kind, float expand, bool released, bool inner_ones, "
      "bool area_norm) -> Tensor");
  m.def("channel_kl(Tensor[] s, Tensor[] t, float temperature, bool entropy) -> (Tensor, Tensor)");
  m.def("channel_kl_backward(Tensor[] s, Tensor[] t, Tensor planes, Tensor grad, float temperature) -> Tensor[]");
  m.def("channel_mean(Tensor[] x, bool absolute) -> Tensor");
  m.def("channel_mean_backward(Tensor[] x, Tensor grad, bool absolute) -> Tensor[]");
  m.def("correlation(Tensor[] s, Tensor[] t, float eps) -> (Tensor, Tensor)");
  m.def("correlation_backward(Tensor[] s, Tensor[] t, Tensor planes, Tensor rows, Tensor grad) -> Tensor[]");
  m.def("logit_bce(Tensor[] s, Tensor[] t, Tensor? weight, float beta) -> Tensor");
  m.def("logit_bce_backward(Tensor grad, Tensor[] s, Tensor[] t, Tensor? weight, float beta) -> Tensor[]");
  m.def("logit_kl(Tensor[] s, Tensor[] t, Tensor? weight, float temperature, int groups) -> Tensor");
  m.def("logit_kl_backward(Tensor grad, Tensor[] s, Tensor[] t, Tensor? weight, float temperature, int groups) -> Tensor[]");
  m.def("map_distance(Tensor m_s, Tensor m_t, Tensor? spatial, " KD_MAP_OPTIONS ") -> (Tensor, Tensor)");
  m.def("map_distance_backward(Tensor m_s, Tensor m_t, Tensor? spatial, Tensor state, Tensor grad, " KD_MAP_OPTIONS ") -> Tensor");
  m.def("pool_weights(Tensor a, int images, int[] pixels, bool softmax) -> Tensor");
  m.def("pool_weights_backward(Tensor weights, Tensor grad, Tensor a, int images, int[] pixels, bool softmax) -> Tensor");
  m.def("random_mask(Tensor[] x, Tensor state, int threshold) -> Tensor[]");
  m.def("shared_read(Tensor[] x, Tensor w, bool absolute, float temperature) -> (Tensor, Tensor, Tensor)");
  m.def("spatial_pool(Tensor[] x, Tensor weights) -> Tensor");
  m.def("terms(Tensor[] s, " KD_OPERANDS ", " KD_OPTIONS ") -> Tensor[]");
  m.def("terms_backward(Tensor grad, Tensor[] saved, Tensor[] arriving, Tensor[] s, " KD_OPERANDS ", " KD_OPTIONS ") -> Tensor[]");
  m.def("terms_with_gradient(Tensor[] s, " KD_OPERANDS ", " KD_OPTIONS ") -> Tensor[]");
  m.def("terms_correct_gradient(Tensor(a!)[] gradients, Tensor grad, Tensor[] saved, Tensor[] s, " KD_OPERANDS ", " KD_OPTIONS
        ") -> ()");
  m.def(
      "terms_persistent(Tensor[] s, Tensor[] t, Tensor[] gradients_s, Tensor[] gradients_t, Tensor mask, Tensor? factors, "
      "str rectify, str distance, float eps, bool relative, str average, float temperature, float[] scales) -> Tensor[]");
  m.def("weighted_channel_sum(Tensor[] x, Tensor w, bool absolute) -> Tensor");
  m.def("weighted_channel_sum_backward(Tensor[] x, Tensor w, Tensor grad, bool absolute) -> Tensor[]");
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}
