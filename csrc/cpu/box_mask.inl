#include "vector.inl"

namespace kd {
namespace KD_ISA {

template <Profile PROFILE>
static void profile(const Span& span, float by, int64_t first, int64_t count, float* values) {
  const float half = span.length / 2;
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats x = (lane_numbers() + static_cast<float>(first + i)) - span.start;
    Floats value = all(by);
    if (PROFILE == Profile::gaussian) {
      const Floats distance = (x - half) / half;
      value *= exp(distance * distance * -0.5f);
    }
    if (PROFILE == Profile::exponential) {
      const Floats distance = x - half;
      value *= exp(distance * distance * -5e-5f);
    }
    store(values + i, where((x >= span.from) & (x < span.to), value, all(0.0f)));
  }
}

static void raise(float* mask, int64_t stride, const float* y, int64_t rows, const float* x, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, mask += stride) {
    for (int64_t i = 0; i < columns; i += LANES) {
      const Floats before = load(mask + i), value = load(x + i) * y[row];
      store(mask + i, where(value > before, value, before));
    }
  }
}

static const BoxMaskKernels kernels = {
    {profile<Profile::ones>, profile<Profile::gaussian>, profile<Profile::exponential>},
    raise,
};

}  // namespace KD_ISA
}  // namespace kd
