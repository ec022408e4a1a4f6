#include "include/pyramid.h"

#include "cpu/parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kd {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

bool is_dense(const Tensor& x, bool last) { return last ? is_channels_last(x) : x.is_contiguous(); }

Level level_of(const Tensor& x, bool last, char* data) { return {data, type_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), last}; }

bool same_shape(const Tensor& x, const Tensor& y) {
  bool same = x.dim() == y.dim();
  for (int64_t axis = 0; same && axis < x.dim(); ++axis) same = x.size(axis) == y.size(axis);
  return same;
}

// Large new memory comes page by page as it is first written to, which is slow; huge pages are fewer. They are asked for at once: later
// all threads would come to the same pages at the same time, and wait for one to be cleared.
void take_huge_pages(const Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t PAGE = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, end = (begin + x.numel() * x.element_size()) / PAGE * PAGE;
  // Refused where the system has none: then all is as it was.
  if (end < first + 2 * PAGE || madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) != 0) return;
  for_each(static_cast<int64_t>((end - first) / PAGE), [&](int64_t page) {
    volatile char* const place = reinterpret_cast<volatile char*>(first + page * PAGE);
    *place = *place;
  });
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
  STD_TORCH_CHECK(like == nullptr || like->size() == x.size(), "expected as many levels as there are of the student, got ", x.size());
  held_.reserve(x.size());
  levels_.reserve(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    STD_TORCH_CHECK(x[i].dim() == 4 && x[i].device() == (like == nullptr ? x : like->held_)[0].device() &&
                        x[i].size(0) == x[0].size(0) && x[i].size(1) > 0 && x[i].size(2) > 0 && x[i].size(3) > 0,
                    "level ", i, ": expected (N, C, H, W), one N for all, on one device, and no empty level");
    STD_TORCH_CHECK(like == nullptr || same_shape(x[i], like->held_[i]), "level ", i, ": another shape than the student's");
    const bool last = like == nullptr ? is_channels_last(x[i]) : (*like)[i].last;
    const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    held_.push_back(is_dense(x[i], last) ? x[i] : torch::stable::contiguous(x[i], format));
    // Read only, though a level's pointer would let write: results have such levels too.
    levels_.push_back(level_of(held_.back(), last, static_cast<char*>(const_cast<void*>(held_.back().const_data_ptr()))));
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
    if (results_.back().is_cpu()) take_huge_pages(results_.back());
  }
  place(like);
}

Results Results::again(std::vector<Tensor> results, const Pyramid& like) {
  STD_TORCH_CHECK(results.size() == like.size(), "expected as many levels as there are of the student, got ", results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    STD_TORCH_CHECK(same_shape(results[i], like.held_[i]) && type_of(results[i]) == like[i].type &&
                        results[i].device() == like.held_[i].device(),
                    "level ", i, ": a result of another shape, type or device than the student's");
  }
  Results made;
  made.results_ = std::move(results);
  made.place(like);
  for (size_t i = 0; i < made.results_.size(); ++i) {
    if (made.written_[i].get() != made.results_[i].get()) torch::stable::copy_(made.written_[i], made.results_[i]);
  }
  return made;
}

void Results::place(const Pyramid& like) {
  for (size_t i = 0; i < results_.size(); ++i) {
    const Tensor& x = results_[i];
    const bool last = like[i].last;
    // Levels of another layout than the kernels' get their values in the end.
    const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    written_.push_back(is_dense(x, last) ? x : torch::stable::empty(x.sizes(), x.scalar_type(), {}, x.device(), {}, format));
    levels_.push_back(level_of(written_.back(), last, static_cast<char*>(written_.back().mutable_data_ptr())));
  }
}

std::vector<Tensor> Results::finish() {
  for (size_t i = 0; i < results_.size(); ++i) {
    if (written_[i].get() != results_[i].get()) torch::stable::copy_(results_[i], written_[i]);
  }
  return std::move(results_);
}

const float* floats(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                  "expected ", count, " contiguous float32 elements on the CPU, got ", x.numel(), " of ", toString(x.scalar_type()));
  return static_cast<const float*>(x.const_data_ptr());
}

const float* floats_beside(const Tensor& x, const Tensor& packed, int64_t count) {
  STD_TORCH_CHECK(packed.device() == x.device() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                      packed.numel() == count,
                  "expected ", count, " contiguous float32 elements on the device of the levels, got ", packed.numel(), " of ",
                  toString(packed.scalar_type()));
  return static_cast<const float*>(packed.const_data_ptr());
}

Tensor new_floats(const std::vector<int64_t>& shape) { return torch::stable::empty(shape, ScalarType::Float); }

}  // namespace kd
