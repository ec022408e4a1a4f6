"""`shared_read`: attention and weighted channel sum of the same features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .attention import attention_of_sums
from .reduce import reduce


def shared_read(x: Sequence[Tensor], w: Tensor, absolute: bool, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The maps sum_c w_c * x_c (of |x| if `absolute`), S and Ch of x (N, C, H, W), packed fp32, from one read of x; w: packed (N, C)."""
    sums = reduce(x, weights=w, absolute=absolute, channel="abs", spatial_abs=True)
    assert sums.raw is not None
    return sums.raw, *attention_of_sums(x, sums, temperature)
