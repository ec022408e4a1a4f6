// The operators `terms`, the same for the CPU and for CUDA: their arguments, what is checked of them, and their results.
// Rows of a result, those that are wanted: the map's, the attention's over pixels and over channels, one an imitation.
#pragma once

#include <string>

#include "map_options.h"
#include "pyramid.h"
#include "reading.h"

namespace kd {

// The operators' arguments besides the options. t: empty without imitations;   factors: (rows, L, N);   the others: packed fp32
struct TermsOperands {
  std::vector<Tensor> s, t;
  std::optional<Tensor> weights, map_t, map_spatial, attention_spatial, attention_channel, channel;
  std::vector<Tensor> spatial;
  std::optional<Tensor> factors;
};

// scales: of each row
struct TermsOptions {
  bool absolute;
  MapOptions map;
  std::string average;
  double temperature;
  int64_t imitations;
  std::vector<double> scales;
};

// What the backward reads again: packed maps and vectors, empty when not wanted, and (3, L, N, STATE).
struct Saved {
  float *raw, *magnitude, *channel_sums, *state;
};

// The arguments of one call, which live longer than this, read and found to fit.
class TermsCall {
 protected:
  TermsCall(const TermsOperands& operands, const TermsOptions& options);

  // Not by their pointers, which are null where there are no images.
  bool has_map() const { return operands_.weights.has_value(); }
  bool attends() const { return operands_.attention_spatial.has_value(); }
  int64_t rows() const { return static_cast<int64_t>(options_.scales.size()); }

  // The elements of a packed tensor beside the student's, null where there is none. Raises unless it is fp32, contiguous, of `count`.
  const float* packed(const std::optional<Tensor>& x, int64_t count) const;
  // An uninitialised fp32 tensor beside the student's.
  Tensor new_floats(const std::vector<int64_t>& shape) const;
  // Uninitialised: rows (rows, L, N), and what `saved_of` takes.
  std::vector<Tensor> new_results() const;
  Saved saved_of(const std::vector<Tensor>& tensors) const;
  // What the read pass makes, the imitations' errors unless that is null; none where there is nothing to make.
  std::optional<Reading> reading(const Saved& saved, float* error) const;
  // The elements of an upstream gradient (rows, L, N).
  const float* upstream_of(const Tensor& grad) const;
  // Where the imitation's row begins, null without one. Raises for several: their values do not come with their gradient.
  float* imitation_row_of(const Tensor& rows) const;

  const TermsOperands& operands_;
  const TermsOptions& options_;
  const Pyramid s_, t_;
  // Images of all levels.
  const int64_t images_;
  const float *const weights_, *const map_t_, *const map_spatial_, *const attention_spatial_, *const attention_channel_, *const channel_,
      *const factors_;
  // The attention's first row, behind that of the map, and the first imitation's.
  const int64_t attention_row_, imitation_row_;
  std::vector<const float*> spatial_;
  // Of the map's distance, a level.
  std::vector<float> divisors_;
};

// The arguments that all four operators end with.
#define KD_TERMS_PARAMETERS                                                                                                          \
  std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weights, std::optional<Tensor> map_t,                          \
      std::optional<Tensor> map_spatial, std::optional<Tensor> attention_spatial, std::optional<Tensor> attention_channel,           \
      std::optional<Tensor> channel, std::vector<Tensor> spatial, std::optional<Tensor> factors, bool absolute, std::string rectify, \
      std::string normalize, std::string normalize_t, std::string distance, double eps, bool relative, double map_temperature,       \
      std::string average, double temperature, int64_t imitations, std::vector<double> scales
#define KD_TERMS(made)                                                                                                                   \
  const TermsOperands operands{s, t, weights, map_t, map_spatial, attention_spatial, attention_channel, channel, spatial, factors};      \
  const TermsOptions options{absolute,                                                                                                   \
                             {rectify_of(rectify), normalize_of(normalize), normalize_of(normalize_t), distance_of(distance),            \
                              static_cast<float>(eps), relative, static_cast<float>(map_temperature)},                                   \
                             average,                                                                                                    \
                             temperature,                                                                                                \
                             imitations,                                                                                                 \
                             scales};                                                                                                    \
  Terms made(operands, options)

// The operators of a device. Terms: its TermsCall, with a method for each of them.
template <class Terms>
struct TermsOperators {
  static std::vector<Tensor> terms(KD_TERMS_PARAMETERS) {
    KD_TERMS(made);
    return made.forward();
  }

  static std::vector<Tensor> terms_with_gradient(KD_TERMS_PARAMETERS) {
    KD_TERMS(made);
    return made.forward_with_gradient();
  }

  static std::vector<Tensor> terms_backward(Tensor grad, std::vector<Tensor> saved, std::vector<Tensor> arriving, KD_TERMS_PARAMETERS) {
    KD_TERMS(made);
    return made.backward(grad, saved, arriving);
  }

  static void terms_correct_gradient(std::vector<Tensor> gradients, Tensor grad, std::vector<Tensor> saved, KD_TERMS_PARAMETERS) {
    KD_TERMS(made);
    made.correct(gradients, grad, saved);
  }

  template <class Library>
  static void add_to(Library& library) {
    library.impl("terms", TORCH_BOX(&TermsOperators::terms));
    library.impl("terms_with_gradient", TORCH_BOX(&TermsOperators::terms_with_gradient));
    library.impl("terms_backward", TORCH_BOX(&TermsOperators::terms_backward));
    library.impl("terms_correct_gradient", TORCH_BOX(&TermsOperators::terms_correct_gradient));
  }
};

#undef KD_TERMS
#undef KD_TERMS_PARAMETERS

}  // namespace kd
