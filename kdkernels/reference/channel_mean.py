"""`channel_mean`: GKD's channel weights, the spatial mean of gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..pyramid import accumulate


def channel_mean(x: Sequence[Tensor], mode: str = "signed") -> list[Tensor]:
    """Mean over H, W of x (`signed`, GKD Eq. 1) or of |x| (`abs`, the released code).

    x: L tensors (N, C, H, W). Returns L tensors (N, C), fp32 (fp64 for fp64).
    """
    levels = [accumulate(level) for level in x]
    return [(level.abs() if mode == "abs" else level).mean((2, 3)) for level in levels]
