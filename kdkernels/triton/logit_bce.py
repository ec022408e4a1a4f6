"""`logit_bce` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .logits import Difference, gradient, rows


def logit_bce(s: Sequence[Tensor], t: Sequence[Tensor], weight: Tensor | None, beta: float) -> Tensor:
    """(L, N) fp32. s, t: levels (N, K, H, W), at least one; weight: packed maps (N, H, W), fp32, or None."""
    return rows(s, t, weight, Difference("bce", beta))


def logit_bce_backward(grad: Tensor, s: Sequence[Tensor], t: Sequence[Tensor], weight: Tensor | None, beta: float) -> list[Tensor]:
    """Gradients of the levels s, in their types and strides, from that of the rows: grad, (L, N) fp32."""
    return gradient(grad, s, t, weight, Difference("bce", beta))
