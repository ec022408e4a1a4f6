"""`weighted_channel_sum`: the maps before rectification and their gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .gradient import gradient
from .reduce import reduce


def weighted_channel_sum(x: Sequence[Tensor], w: Tensor, absolute: bool) -> Tensor:
    """sum_c w_c x_c, or of |x_c| if absolute. x: levels (N, C, H, W); w: packed (N, C). Returns packed (N, H, W), fp32."""
    raw = reduce(x, weights=w, absolute=absolute).raw
    assert raw is not None
    return raw


def weighted_channel_sum_backward(x: Sequence[Tensor], w: Tensor, grad: Tensor, absolute: bool) -> list[Tensor]:
    """Gradients of x's levels, given grad, packed (N, H, W), of what `weighted_channel_sum` returns."""
    return gradient(x, product=(w, grad), absolute=absolute)
