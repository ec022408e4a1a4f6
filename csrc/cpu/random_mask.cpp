// `random_mask`: pixels set to 0 that Philox chooses.
#include "random_mask.h"

#include <vector>

#include "bands.h"
#include "parallel.h"
#include "rows.h"
#include "streams.h"

#define KD_KERNELS "random_mask.inl"
#include "each_isa.h"

namespace kd {
namespace {

const RandomMaskKernels& kernels() { return chosen(scalar::kernels, avx2::kernels, avx512::kernels); }

// What a thread needs for one band: which pixels are kept, and a row to be streamed.
struct Scratch {
  std::vector<uint32_t> kept;
  std::vector<char> row;
};

class Masker {
 public:
  Masker(const Pyramid& x, const Results& out, const RandomPixels& pixels)
      : x_(x), out_(out), pixels_(pixels), streamed_(is_streamed(x)) {}

  void run() const {
    const Bands bands(x_);
    for_each(bands.count(), [&](int64_t i) {
      thread_local Scratch scratch;
      const Band band = bands[i];
      const Level& level = x_[band.level];
      scratch.kept.resize(band.pixels);
      kernels().choose(pixels_, band.first, band.image, static_cast<int64_t>(band.level), band.pixels, scratch.kept.data());
      const int64_t row = level.row_bytes();
      scratch.row.assign(row, 0);
      const int64_t first = band.image * level.image_bytes() + band.first * (level.last ? row : bytes_of(level.type));
      if (level.last) {
        rows_of_channels(level.data + first, out_[band.level].data + first, row, scratch);
      } else {
        rows_of_pixels(level, level.data + first, out_[band.level].data + first, scratch);
      }
      end_streams();
    });
  }

 private:
  void rows_of_channels(const char* from, char* to, int64_t bytes, const Scratch& scratch) const {
    for (const uint32_t kept : scratch.kept) {
      put(to, kept != 0 ? from : scratch.row.data(), bytes);
      from += bytes, to += bytes;
    }
  }

  void rows_of_pixels(const Level& level, const char* from, char* to, Scratch& scratch) const {
    const int64_t count = static_cast<int64_t>(scratch.kept.size()), bytes = count * bytes_of(level.type);
    const auto select = kernels().select[level.type == Type::fp32 ? 0 : 1];
    for (int64_t c = 0; c < level.channels; ++c, from += level.row_bytes(), to += level.row_bytes()) {
      char* const made = streamed_ ? scratch.row.data() : to;
      select(from, scratch.kept.data(), count, made);
      if (streamed_) put(to, made, bytes);
    }
  }

  void put(char* to, const char* from, int64_t bytes) const {
    if (streamed_) {
      row_kernels().stream(to, from, bytes);
    } else {
      std::copy_n(from, bytes, to);
    }
  }

  const Pyramid& x_;
  const Results& out_;
  const RandomPixels& pixels_;
  const bool streamed_;
};

std::vector<Tensor> random_mask(std::vector<Tensor> x, Tensor state, int64_t threshold) {
  const Pyramid levels(x);
  Results out(x, levels);
  Masker(levels, out, {state_beside(first_of(x), state), threshold}).run();
  return out.finish();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { m.impl("random_mask", TORCH_BOX(&kd::random_mask)); }
