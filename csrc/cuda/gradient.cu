// The write pass of primitives whose factors are there, as vectors and maps.
#include "gradient.h"

namespace kd {
namespace {

struct GivenSlopes {
  Factors product, sign;
  bool mean;

  template <unsigned kTerms>
  KD_DEVICE Numbers of_channel(const ImageOfLevel& image, int64_t c) const {
    const float of_product = number(product, product.channel, image.vector + c, 1);
    return {mean ? of_product / static_cast<float>(image.place.pixels) : of_product, number(sign, sign.channel, image.vector + c, 0), 0};
  }

  template <unsigned kTerms>
  KD_DEVICE Numbers of_pixel(const ImageOfLevel& image, int64_t p) const {
    return {number(product, product.pixel, image.map + p, 1), number(sign, sign.pixel, image.map + p, 0), 0};
  }

 private:
  KD_DEVICE static float number(const Factors& term, const float* packed, int64_t at, float neutral) {
    return !term.there ? 0.0f : packed != nullptr ? packed[at] : neutral;
  }
};

}  // namespace

void gradient(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out) {
  if (x.images() == 0) return;
  const unsigned terms = (wanted.product.there ? kProduct : 0u) | (wanted.sign.there ? kSign : 0u);
  const WritePass pass{terms, nullptr, nullptr, wanted.absolute, wanted.absolute || wanted.sign.there, nullptr, nullptr};
  const GivenSlopes slopes{wanted.product, wanted.sign, wanted.mean};
  const auto slopes_of = [&](const Places&) { return slopes; };
  by_type({&x}, [&](auto type) {
    using X = decltype(type);
    // Of mixed types, which are rare, one for both: each takes time to compile.
    if constexpr (std::is_same_v<X, Any>) {
      write_by<X, kProduct | kSign>(device, like, x, pass, slopes_of, out);
    } else {
      write_by<X, kProduct, kSign>(device, like, x, pass, slopes_of, out);
    }
  });
}

}  // namespace kd
