"""`attention`: spatial and channel attention of FGD, BMFI and FBKD."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..pyramid import accumulate


def attention(x: Sequence[Tensor], temperature: float = 0.5) -> tuple[list[Tensor], list[Tensor]]:
    """S = H*W * softmax_hw(mean_c |x| / temperature) and Ch = C * softmax_c(mean_hw |x| / temperature), both of mean 1.

    Formulas of the released GKD code, the same as FGD's.

    x: L tensors (N, C, H, W). Returns S, L tensors (N, H, W), and Ch, L tensors (N, C); fp32 (fp64 for fp64).
    """
    spatial, channel = [], []
    for level in x:
        n, c, h, w = level.shape
        values = accumulate(level)
        # Two |x| keep the gradient in x's memory layout; sums divided afterwards, unlike means, have a backward that divides small tensors.
        spatial.append((h * w) * (values.abs().sum(1).flatten(1) / (c * temperature)).softmax(1).view(n, h, w))
        channel.append(c * (values.abs().sum((2, 3)) / (h * w * temperature)).softmax(1))
    return spatial, channel
