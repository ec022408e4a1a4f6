"""`shared_read`: attention and weighted channel sum of the same features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .attention import attention
from .weighted_channel_sum import weighted_channel_sum


def shared_read(
    x: Sequence[Tensor], w: Sequence[Tensor], activation: str = "raw", rectify: str = "abs", temperature: float = 0.5
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The maps r of `weighted_channel_sum`, without their extrema, and S and Ch of `attention`.

    x: L tensors (N, C, H, W); w: L tensors (N, C), or (N, C, H, W) for a weight per element.
    Returns r, L tensors (N, H, W), S, L tensors (N, H, W), and Ch, L tensors (N, C); fp32 (fp64 for fp64).
    """
    maps, _, _ = weighted_channel_sum(x, w, activation, rectify)
    return maps, *attention(x, temperature)
