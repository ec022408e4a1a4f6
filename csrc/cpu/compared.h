// Two pyramids compared channel by channel, for `channel_kl` and `correlation`: what is left of each channel of a band, and the rows of
// the gradient. The formulas are those of kdkernels/triton/compared_read.py and compared_write.py.
#pragma once

#include <cstdint>
#include <vector>

#include "../include/pyramid.h"
#include "bands.h"

namespace kd {

enum class Comparison { kl, cross_entropy, correlation };

// Numbers that are left of a channel:
//   kl, cross_entropy  m_s, the largest value of s, and z_s = sum exp((s - m_s) k), the same of t, and with e_t = exp((t - m_t) k) the
//                      sum of e_t d, d = (t - m_t) k - (s - m_s) k or, of cross_entropy, (m_s - s) k; of kl also the sum of
//                      e_t (exp(-d) - 1 + d), in which near distributions keep their digits
//   correlation        means a and b of s and t less their origins, X = sum (s - a)^2, the slope of t by s and what it leaves of t,
//                      sum (t - b - slope (s - a))^2
constexpr int MOST_NUMBERS = 6;
constexpr int numbers_of(Comparison kind) { return kind == Comparison::kl ? 6 : 5; }

// Elements of one channel.
//   k                   1 / temperature;   origin_s, origin_t: what s and t are taken less, of the correlation
//   numbers             every `apart`-th is one
struct ComparedRow {
  const float *s, *t;
  int64_t count;
  float k, origin_s, origin_t;
  float* numbers;
  int64_t apart;
};

// Some pixels of `count` channels, which lie behind each other.
//   pixels, row         of a channel, and elements from one pixel to the next
//   before              pixels whose numbers are there already, and are joined
//   numbers             (numbers, apart), of which the first `count` of each
struct ComparedTile {
  const float *s, *t;
  int64_t pixels, row, count, before;
  float k;
  const float *origin_s, *origin_t;
  float* numbers;
  int64_t apart;
};

// Elements of a gradient: by * (u exp((s - a) k) - v exp((t - b) k)) or, of the correlation, by * (u (s - a) + v (t - b) + w).
//   planes              a, u, b, v and w, each (count,) or, where all elements are of one channel, one number
struct ComparedSlopes {
  const float *s, *t;
  int64_t count;
  const float* planes[5];
  float k, by;
  float* made;
};

struct ComparedKernels {
  // By Comparison.
  void (*row[3])(const ComparedRow&);
  void (*tile[3])(const ComparedTile&);
  // Of the correlation or not, and by whether the elements are of one channel.
  void (*slopes[2][2])(const ComparedSlopes&);
};

// What a read of s and t leaves. Numbers of band `number` of an image are at part(level, image) + number * numbers_of(kind) * channels.
class ComparedParts {
 public:
  ComparedParts(const Pyramid& s, const Pyramid& t, Comparison kind, float k);

  const float* part(size_t level, int64_t image) const;
  // Bands of an image, and pixels of one of them.
  int64_t bands(size_t level) const { return bands_.of_image(level); }
  int64_t pixels(size_t level, int64_t number) const { return bands_[bands_.first_of(level, 0) + number].pixels; }
  // What s and t of a level are taken less, (2, C).
  const std::vector<float>& origins(size_t level) const { return origins_[level]; }

 private:
  const Pyramid& s_;
  const Bands bands_;
  const int numbers_;
  std::vector<int64_t> firsts_;
  std::vector<std::vector<float>> origins_;
  Tensor parts_;
};

// Writes the gradient of s.
//   planes, apart       five or, without `correlation`, four planes of channels, `apart` numbers from one to the next;   of the correlation
//                       those of a level's channels, otherwise of an image's, packed (N, C)
//   by                  (L, N), a factor of each row
void compared_gradient(const Pyramid& s, const Pyramid& t, const float* planes, int64_t apart, const std::vector<float>& by, float k,
                       bool correlation, const Results& out);

}  // namespace kd
