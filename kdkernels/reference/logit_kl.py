"""`logit_kl`: the divergence of two networks' logits, blocks of channels each a distribution (LD, CrossKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pyramid import accumulate, stack_levels


def logit_kl(
    s: Sequence[Tensor], t: Sequence[Tensor], weight: Sequence[Tensor] | None = None, temperature: float = 1.0, groups: int = 1
) -> Tensor:
    """sum_hw weight * sum_groups sum_bins q * (log q - log p), q and p the softmax of t / temperature and s / temperature over each of
    `groups` blocks of K / groups channels.

    s, t: L tensors (N, K, H, W); weight: L tensors (N, H, W) or None; t and weight are constants.
    Returns (L, N), fp32 (fp64 for fp64).
    """
    rows = []
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        x, y = (_centred(accumulate(v).unflatten(1, (groups, -1))) for v in (a, b.detach()))
        image = _divergence(x, y, temperature).sum((1, 2))
        rows.append((image if weight is None else image * weight[level].detach()).sum((1, 2)))
    return stack_levels(rows)


def _centred(x: Tensor) -> Tensor:
    """Without the largest logit, a constant: differences from it are all that counts."""
    return x - x.detach().amax(2, keepdim=True)


def _divergence(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """q * (log q - log p) + p - q, whose sum over a distribution is the divergence, and which is never negative."""
    sum_p, sum_q = ((v / temperature).logsumexp(2, keepdim=True) for v in (x, y))
    p, q = (x / temperature - sum_p).exp(), (y / temperature - sum_q).exp()
    # Of distributions that differ little nothing is left but second-order terms: these must not be differences of numbers of order 1.
    # A bin that the teacher rules out adds p alone, also where its logit is -inf.
    ratio = torch.where(q == 0, 0, (y - x) / temperature - (sum_q - sum_p))
    near = (ratio.abs() < 1) & (q > 0)
    small = torch.where(near, ratio, 0)
    return torch.where(near, q * (torch.expm1(-small) + small), p - q + q * ratio)
