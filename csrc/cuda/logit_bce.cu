// `logit_bce` on CUDA: binary cross-entropy of two networks' class logits, element by element.
#include "logits.h"

namespace kd {
namespace {

struct Term {
  float value, slope;
};

// sigma of x and of -x, and exp(-|x|).
struct Sigmas {
  float of, of_other, e;

  KD_DEVICE explicit Sigmas(float x) {
    e = expf(-fabsf(x));
    const float large = 1.0f / (1.0f + e), small = e * large;
    of = x > 0 ? large : small;
    of_other = x > 0 ? small : large;
  }
};

// |d|^beta * BCE(s, sigma(t)) with d = sigma(s) - sigma(t), and its derivative.
KD_DEVICE Term cross_entropy(float s, float t, float beta) {
  const Sigmas a(s), b(t);
  Term term;
  term.value = log1pf(a.e) + fabsf(s) * (s > 0 ? b.of_other : b.of);
  // Of what is nearly equal from the difference of the logits: sigma(s) * sigma(-t) * (1 - exp(-x)) for x > 0.
  const float x = s - t, step = fabsf(x);
  float d = s > 0 && t > 0 ? b.of_other - a.of_other : a.of - b.of;
  if (step < 0.5f) d = (x > 0 ? a.of * b.of_other : -a.of_other * b.of) * (step - second_order(step));
  term.slope = d;
  if (beta == 0) return term;
  // Of sigma(s), times the loss.
  const float rise = a.of * a.of_other * term.value, size = fabsf(d);
  float power = 1;
  if (beta == 2) {
    power = size;
  } else if (beta != 1) {
    power = size == 0 ? 0.0f : expf((beta - 1) * logf(size));
  }
  term.value *= power * size;
  term.slope = power * (size * d + beta * sign(d) * rise);
  return term;
}

// Elements of an image, which follow each other in memory whatever the layout, in tiles.
template <bool kGradient>
struct CrossEntropy {
  static constexpr int kThreads = 256, kResident = 4, kWarps = kThreads / kWarp;
  static constexpr int kEach = 8, kTile = kThreads * kEach;
  struct Shared {
    float of_warp[kWarps];
  };

  LogitLevels levels;
  float beta;

  static int64_t blocks(const Level& level) { return ceil_div<int64_t>(level.channels * level.pixels, kTile); }

  template <class Me>
  KD_DEVICE void operator()(Me& me, Shared& shared) const {
    const LogitImage image = LogitImage::of(levels, me.block());
    const int64_t elements = image.place.channels * image.place.pixels;
    float total = 0;
    for (int k = 0; k < kEach; ++k) {
      const int64_t i = image.tile * kTile + k * kThreads + me.index();
      if (i >= elements) break;
      const Term term = cross_entropy(element_at(image.s, image.first + i), element_at(image.t, image.first + i), beta);
      const float weight = image.weight == nullptr ? 1.0f : image.weight[image.place.last ? i / image.place.channels : i % image.place.pixels];
      if (kGradient) {
        write_element(image.out, image.s.type, image.first + i, term.slope * weight * image.scale);
      } else {
        total += term.value * weight;
      }
    }
    if (kGradient) return;
    total = block_sum(me, total, shared.of_warp, kWarps);
    if (me.index() == 0) levels.parts[me.block()] = total;
  }
};

Tensor logit_bce(std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight, double beta) {
  using Kernel = CrossEntropy<false>;
  return Logits(s, t, weight).rows(Kernel::blocks, [&](const LogitLevels& levels) { return Kernel{levels, static_cast<float>(beta)}; });
}

std::vector<Tensor> logit_bce_backward(Tensor grad, std::vector<Tensor> s, std::vector<Tensor> t, std::optional<Tensor> weight,
                                       double beta) {
  using Kernel = CrossEntropy<true>;
  const auto make = [&](const LogitLevels& levels) { return Kernel{levels, static_cast<float>(beta)}; };
  return Logits(s, t, weight).gradient(grad, Kernel::blocks, make);
}

}  // namespace
}  // namespace kd

KD_OPERATORS(m) {
  m.impl("logit_bce", TORCH_BOX(&kd::logit_bce));
  m.impl("logit_bce_backward", TORCH_BOX(&kd::logit_bce_backward));
}
