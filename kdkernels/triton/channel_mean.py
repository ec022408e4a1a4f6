"""`channel_mean` and its gradient, on the read pass and the write pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .channel_sums import ChannelParts, channel_sums
from .gradient import gradient
from .levels import sizes_of
from .reduce import reduce


def channel_mean(x: Sequence[Tensor], absolute: bool) -> Tensor:
    """Means over H, W of x, or of |x|. x: levels (N, C, H, W), at least one. Returns packed (N, C), fp32."""
    _, channels, pixels = sizes_of(x)
    parts = reduce(x, channel="abs" if absolute else "signed").channel
    assert parts is not None
    return channel_sums(parts, channels, pixels)


def channel_mean_backward(x: Sequence[Tensor], grad: Tensor, absolute: bool) -> list[Tensor]:
    """Gradients of the levels x, in their types and strides, from that of the means: grad, packed (N, C), fp32."""
    _, channels, pixels = sizes_of(x)
    share = channel_sums(ChannelParts(grad, (1,) * len(x)), channels, pixels)
    return gradient(x, product=(share, None), absolute=absolute)
