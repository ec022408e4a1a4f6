#include "gradient.h"

namespace kd {
namespace {

template <class X, unsigned kTerms>
void gradient_as(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out) {
  using Pass = Gradient<X, kTerms>;
  Pass pass{};
  pass.product = wanted.product, pass.sign = wanted.sign, pass.error = wanted.error;
  pass.absolute = wanted.absolute, pass.mean = wanted.mean, pass.unless = wanted.unless;
  pass.reads = kTerms != kProduct || wanted.absolute;
  in_launches(x, write_blocks<X>, [&](const Places& places) {
    pass.places = places;
    for (int i = 0; i < places.count; ++i) {
      const int level = places.place[i].index;
      pass.x[i] = memory_of(x[level]);
      if constexpr (Pass::kErrors) pass.target[i] = memory_of((*wanted.target)[level]);
      if constexpr (Pass::kAdds) pass.arriving[i] = memory_of((*wanted.arriving)[level]);
      pass.out[i] = memory_of(out[level]);
    }
    const Tensor parts = new_floats(like, {wanted.values != nullptr ? places.blocks() : 0});
    pass.parts = wanted.values != nullptr ? floats(parts) : nullptr;
    device.launch(pass, places.blocks());
    if (wanted.values == nullptr) return;
    device.launch(SumSquares{places, floats(parts), wanted.values}, places.count * places.images);
  });
}

// Calls the first of the kernels that has all of the terms; what else it has is 0, so that it must not read what is not there.
template <class X, unsigned kTerms, unsigned... kOthers>
void gradient_by(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out, unsigned bits) {
  constexpr unsigned kRead = kSquares | kArriving;
  if ((bits & ~kTerms) == 0 && (bits & kRead) == (kTerms & kRead)) return gradient_as<X, kTerms>(device, like, x, wanted, out);
  if constexpr (sizeof...(kOthers) > 0) {
    gradient_by<X, kOthers...>(device, like, x, wanted, out, bits);
  } else {
    STD_TORCH_CHECK(false, "no write pass has the terms ", bits);
  }
}

constexpr unsigned kMaps = kProduct | kSign, kWhole = kMaps | kSquares;

}  // namespace

void gradient(const OnDeviceOf& device, const Tensor& like, const Pyramid& x, const Writing& wanted, const Results& out) {
  if (x.images() == 0) return;
  const unsigned bits = (wanted.product.there ? kProduct : 0u) | (wanted.sign.there ? kSign : 0u) | (wanted.error.there ? kSquares : 0u) |
                        (wanted.arriving != nullptr ? kArriving : 0u);
  by_type({&x, wanted.error.there ? wanted.target : nullptr, wanted.arriving}, [&](auto type) {
    using X = decltype(type);
    // Of mixed types, which are rare, fewer: each of them takes time to compile.
    if constexpr (std::is_same_v<X, Any>) {
      gradient_by<X, kMaps, kWhole, kMaps | kArriving, kWhole | kArriving>(device, like, x, wanted, out, bits);
    } else {
      gradient_by<X, kProduct, kSign, kSquares, kMaps, kWhole, kMaps | kArriving, kWhole | kArriving>(device, like, x, wanted, out, bits);
    }
  });
}

}  // namespace kd
