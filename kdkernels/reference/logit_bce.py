"""`logit_bce`: binary cross-entropy of two networks' class logits (FRS, CrossKD, GID)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pyramid import accumulate, stack_levels


def logit_bce(s: Sequence[Tensor], t: Sequence[Tensor], weight: Sequence[Tensor] | None = None, beta: float = 0.0) -> Tensor:
    """sum_hw weight * sum_k |sigma(s) - sigma(t)|^beta * BCE(s, sigma(t)), BCE(s, y) = max(s, 0) - s * y + log(1 + exp(-|s|)).

    s, t: L tensors (N, K, H, W); weight: L tensors (N, H, W) or None; t and weight are constants.
    Returns (L, N), fp32 (fp64 for fp64).
    """
    rows = []
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        x, y = accumulate(a), accumulate(b.detach())
        # The sum of two positive products: nothing cancels where both networks are sure.
        error = -(y.sigmoid() * F.logsigmoid(x) + (-y).sigmoid() * F.logsigmoid(-x))
        if beta > 0:
            error = error * _power(_difference(x, y), beta)
        image = error.sum(1)
        rows.append((image if weight is None else image * weight[level].detach()).sum((1, 2)))
    return stack_levels(rows)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """|sigma(x) - sigma(y)|, to all its digits where the two are near."""
    high, low = torch.maximum(x, y), torch.minimum(x, y)
    return high.sigmoid() * (-low).sigmoid() * -torch.expm1(low - high)


def _power(x: Tensor, beta: float) -> Tensor:
    """x^beta of x >= 0, with the derivative 0 at 0."""
    none = x == 0
    return torch.where(none, 0, torch.where(none, 1, x) ** beta)
