"""`weighted_channel_sum`: GKD's map before normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pyramid import accumulate


def weighted_channel_sum(
    x: Sequence[Tensor], w: Sequence[Tensor], activation: str = "raw", rectify: str = "abs"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """r = rectify(sum_c w_c * activation(x_c)) and its extrema (GKD Eq. 2 and the inner part of Eq. 3).

    x: L tensors (N, C, H, W); w: L tensors (N, C), or (N, C, H, W) for a weight per element.
    Returns the maps (N, H, W), their minima (N,) and maxima (N,), each a list of L; fp32 (fp64 if either is).
    """
    maps = []
    for level, weight in zip(x, w, strict=True):
        values, weight = accumulate(level), accumulate(weight)
        if activation == "abs":
            values = values.abs()
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        raw = (values * weight).sum(1)
        if rectify == "relu":
            # relu() would make an innocent 0 of a sum of -inf, which an overflowed gradient brings; -inf * 0 is NaN.
            raw = torch.where(raw > 0, raw, raw * 0)
        maps.append(raw.abs() if rectify == "abs" else raw)
    return maps, [r.amin((1, 2)) for r in maps], [r.amax((1, 2)) for r in maps]
