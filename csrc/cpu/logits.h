// `logit_bce` and `logit_kl`: what the logits of two networks differ by, and its gradient. Both are made in tiles of fp32 rows, of which the
// lanes of a register hold neighbours.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "../include/pyramid.h"

namespace kd {

// A tile of logits: `rows` rows of `count` elements, `stride` behind each other.
//   weight  (count,), null for 1
//   out     null, where the tile's sum is wanted; else its gradient goes there, rows as those of s, times `scale`
//   room    (2, rows, LANES) of nobody's
struct LogitTile {
  const float *s, *t, *weight;
  int64_t rows, count, stride;
  float scale;
  float *out, *room;
};

struct LogitKernels {
  // Each returns the sum, or 0 where there is `out`.
  double (*cross_entropy)(const LogitTile& tile, float beta);
  // A column of the tile is a distribution.
  double (*divergence)(const LogitTile& tile, float temperature);
};

const LogitKernels& logit_kernels();

// What is to be made of tiles. groups: distributions of a pixel, each a tile's columns; 0 where elements are independent of each other.
struct LogitDifference {
  std::function<double(const LogitTile&)> run;
  int64_t groups;
};

// (L, N). weight: packed maps (N, P), or none.
Tensor logit_rows(const std::vector<Tensor>& s, const std::vector<Tensor>& t, const std::optional<Tensor>& weight, const LogitDifference& of);

// Gradient of s from that of the rows, (L, N).
std::vector<Tensor> logit_gradient(const Tensor& grad, const std::vector<Tensor>& s, const std::vector<Tensor>& t,
                                   const std::optional<Tensor>& weight, const LogitDifference& of);

}  // namespace kd
