// Pyramids as the kernels see them: levels (N, C, H, W) of fp32, fp16 or bf16, each dense, channels before or behind the pixels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace kd {

using torch::stable::Tensor;

enum class Type { fp32, fp16, bf16 };

inline int64_t bytes_of(Type type) { return type == Type::fp32 ? 4 : 2; }

// data: (N, C, P) or, with `last`, (N, P, C);   P: height * width
struct Level {
  char* data;
  Type type;
  int64_t images, channels, pixels;
  bool last;

  int64_t row_bytes() const { return (last ? channels : pixels) * bytes_of(type); }
  int64_t image_bytes() const { return channels * pixels * bytes_of(type); }
};

// The type of x. Raises where no kernel takes it.
Type type_of(const Tensor& x);

// Whether x (N, C, H, W) is dense with its channels behind its pixels, and not also contiguous.
bool is_channels_last(const Tensor& x);

// Levels whose memory lives as long as this does: that of the tensors where they are dense, a copy otherwise.
class Pyramid {
 public:
  // x: levels (N, C, H, W).  like: another pyramid of the same shapes, in whose layout each level is to be.
  explicit Pyramid(const std::vector<Tensor>& x, const Pyramid* like = nullptr);

  const Level& operator[](size_t level) const { return levels_[level]; }
  size_t size() const { return levels_.size(); }
  int64_t images() const { return levels_.empty() ? 0 : levels_[0].images; }
  // Elements of packed vectors (N, C) and of packed maps (N, P) of all levels.
  int64_t vectors() const;
  int64_t maps() const;

 private:
  friend class Results;
  std::vector<Tensor> held_;
  std::vector<Level> levels_;
};

// New levels of the strides that `torch.empty_like` gives x; written in the layout of `like`, and brought to their own by `finish`.
class Results {
 public:
  Results(const std::vector<Tensor>& x, const Pyramid& like);
  // Tensors that there are, of such strides, to be written again, or to stay as they are.
  static Results again(std::vector<Tensor> results, const Pyramid& like);

  const Level& operator[](size_t level) const { return levels_[level]; }
  std::vector<Tensor> finish();

 private:
  Results() = default;
  void place(const Pyramid& like);

  std::vector<Tensor> results_, written_;
  std::vector<Level> levels_;
};

// An uninitialised fp32 tensor on the CPU. Scratch is made so too: torch then counts it, and poisons it where it is asked to.
Tensor new_floats(const std::vector<int64_t>& shape);

// The first level. Raises for none.
inline const Tensor& first_of(const std::vector<Tensor>& levels) {
  STD_TORCH_CHECK(!levels.empty(), "expected at least one level");
  return levels[0];
}

// The elements of a packed tensor. Raises unless it is fp32, contiguous and of `count` elements; null where there is none.
const float* floats(const Tensor& x, int64_t count);
inline const float* floats(const std::optional<Tensor>& x, int64_t count) { return x ? floats(*x, count) : nullptr; }

// The same of a packed tensor on x's device, and null where there is none.
const float* floats_beside(const Tensor& x, const Tensor& packed, int64_t count);
inline const float* floats_beside(const Tensor& x, const std::optional<Tensor>& packed, int64_t count) {
  return packed ? floats_beside(x, *packed, count) : nullptr;
}

// The elements of a tensor that `new_floats` made.
inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace kd
