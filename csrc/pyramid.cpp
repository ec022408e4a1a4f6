#include "include/pyramid.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kd {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

bool is_dense(const Tensor& x, bool last) { return last ? is_channels_last(x) : x.is_contiguous(); }

Level level_of(const Tensor& x, bool last) {
  return {static_cast<char*>(x.mutable_data_ptr()), type_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), last};
}

// Large new memory comes page by page as it is first written to, which takes as long as the writing; with large pages it does not.
void advise_huge_pages(const Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t PAGE = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, end = (begin + x.numel() * x.element_size()) / PAGE * PAGE;
  // Refused where the system has none: then it is as it was.
  if (end >= first + 2 * PAGE) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Type type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return Type::fp32;
  if (type == ScalarType::Half) return Type::fp16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "kdkernels takes float32, float16 and bfloat16; got ", toString(type));
  return Type::bf16;
}

bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t wanted[] = {height * width * channels, 1, width * channels, channels};
  for (int axis = 0; axis < 4; ++axis) {
    if (x.size(axis) != 1 && x.stride(axis) != wanted[axis]) return false;
  }
  return true;
}

Pyramid::Pyramid(const std::vector<Tensor>& x, const Pyramid* like) {
  held_.reserve(x.size());
  levels_.reserve(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    STD_TORCH_CHECK(x[i].dim() == 4 && x[i].device() == x[0].device(), "level ", i, ": expected (N, C, H, W), all on one device");
    const bool last = like == nullptr ? is_channels_last(x[i]) : (*like)[i].last;
    const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    held_.push_back(is_dense(x[i], last) ? x[i] : torch::stable::contiguous(x[i], format));
    levels_.push_back(level_of(held_.back(), last));
  }
}

int64_t Pyramid::vectors() const {
  int64_t sum = 0;
  for (const Level& level : levels_) sum += level.images * level.channels;
  return sum;
}

int64_t Pyramid::maps() const {
  int64_t sum = 0;
  for (const Level& level : levels_) sum += level.images * level.pixels;
  return sum;
}

Results::Results(const std::vector<Tensor>& x, const Pyramid& like) {
  for (const Tensor& level : x) {
    results_.push_back(torch::stable::empty_like(level));
    advise_huge_pages(results_.back());
  }
  place(like);
}

Results Results::again(std::vector<Tensor> results, const Pyramid& like) {
  Results made;
  made.results_ = std::move(results);
  made.place(like);
  return made;
}

void Results::place(const Pyramid& like) {
  for (size_t i = 0; i < results_.size(); ++i) {
    const bool last = like[i].last;
    // Levels of another layout than the kernels' get their values in the end.
    const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    written_.push_back(is_dense(results_[i], last) ? results_[i] : torch::stable::contiguous(results_[i], format));
    levels_.push_back(level_of(written_.back(), last));
  }
}

std::vector<Tensor> Results::finish() {
  for (size_t i = 0; i < results_.size(); ++i) {
    if (written_[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written_[i]);
  }
  return std::move(results_);
}

float* floats(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                  "expected ", count, " contiguous float32 elements on the CPU, got ", x.numel(), " of ", toString(x.scalar_type()));
  return floats(x);
}

Tensor new_floats(const std::vector<int64_t>& shape) { return torch::stable::empty(shape, ScalarType::Float); }

}  // namespace kd
