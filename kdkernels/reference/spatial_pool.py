"""`spatial_pool`: the mean of features over pixels, weighted by a map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pyramid import accumulate


def pool_weights(a: Tensor, normalize: str) -> Tensor:
    """Weights of the pixels of a map (N, H, W) that sum to 1 over an image: a over its sum, 0 where that is 0, or the softmax of a."""
    if normalize == "softmax":
        return a.flatten(1).softmax(1).view(a.shape)
    total = a.sum((1, 2), keepdim=True)
    return torch.where(total == 0, 0, a / torch.where(total == 0, 1, total))


def spatial_pool(x: Sequence[Tensor], a: Sequence[Tensor], normalize: str = "mean") -> list[Tensor]:
    """sum_hw a * x / sum_hw a (`mean`; 0 where the sum of a is 0) or sum_hw softmax_hw(a) * x (`softmax`).

    x: L tensors (N, C, H, W); a: L tensors (N, H, W). Returns L tensors (N, C), fp32 (fp64 if either is).
    """
    pairs = [(accumulate(level), pool_weights(accumulate(weights), normalize)) for level, weights in zip(x, a, strict=True)]
    return [(level * weights[:, None]).sum((2, 3)) for level, weights in pairs]
