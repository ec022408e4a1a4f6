"""`correlation`: the distance of features normalised per channel over the batch, 1 - Pearson's r (PKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pyramid import accumulate, split_over_images, stack_levels


def correlation(s: Sequence[Tensor], t: Sequence[Tensor], eps: float = 1e-6) -> Tensor:
    """V = sum (z_s - z_t)^2 / (2 N C H W) of each level, with z = (x - mean) / (std + eps) per channel over N, H and W.

    std is the unbiased one, and 0 for a single value. The images' rows are their shares of V by sum_{c,h,w} (z_s - z_t)^2, which are
    constants: the gradient of their sum is that of V.

    s, t: L tensors (N, C, H, W); t is a constant. Returns (L, N), fp32 (fp64 for fp64).
    """
    rows = []
    for a, b in zip(s, t, strict=True):
        d = _standardised(accumulate(a), eps) - _standardised(accumulate(b.detach()), eps)
        errors = (d * d).sum((1, 2, 3))
        total = errors.sum() / (2 * max(d.numel(), 1))
        rows.append(split_over_images(total[None], errors[None])[0])
    return stack_levels(rows)


def _standardised(x: Tensor, eps: float) -> Tensor:
    count = x.shape[0] * x.shape[2] * x.shape[3]
    # Twice: what rounding the mean of large values leaves would be the larger part of a small deviation.
    for _ in range(2):
        x = x - x.sum((0, 2, 3), keepdim=True) / max(count, 1)
    variance = (x * x).sum((0, 2, 3), keepdim=True) / max(count - 1, 1)
    # sqrt has no derivative at 0; a constant channel's deviation gets the gradient 0.
    constant = variance == 0
    deviation = torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())
    return x / (deviation + eps)
