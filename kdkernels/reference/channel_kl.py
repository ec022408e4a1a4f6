"""`channel_kl`: the divergence of two networks' channels, each a distribution over its pixels (CWD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pyramid import accumulate, stack_levels


def channel_kl(s: Sequence[Tensor], t: Sequence[Tensor], temperature: float = 1.0, entropy: bool = True) -> Tensor:
    """sum_c KL(p_c || q_c) with p_c = softmax_hw(t_c / temperature) and q_c = softmax_hw(s_c / temperature); without `entropy` the
    cross-entropy, -sum_c sum_hw p_c log q_c.

    s, t: L tensors (N, C, H, W); t is a constant. Returns (L, N), fp32 (fp64 for fp64).
    """
    rows = []
    for a, b in zip(s, t, strict=True):
        log_q, log_p = _log_softmax(accumulate(a), temperature), _log_softmax(accumulate(b.detach()), temperature)
        rows.append((_divergence(log_p, log_q) if entropy else -log_p.exp() * log_q).sum((1, 2, 3)))
    return stack_levels(rows)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p * (log p - log q) + q - p, whose sum over a distribution is the divergence, and which is never negative."""
    p, q = log_p.exp(), log_q.exp()
    # Of distributions that differ little nothing is left but second-order terms: these must not be differences of numbers of order 1.
    ratio = log_p - log_q
    near = ratio.abs() < 1
    small = torch.where(near, ratio, 0)
    return torch.where(near, p * (torch.expm1(-small) + small), q - p + p * ratio)


def _log_softmax(x: Tensor, temperature: float) -> Tensor:
    """Over H and W, in x's memory layout. The largest logit, a constant, goes first: differences from it are all that counts."""
    centred = (x - x.detach().amax((2, 3), keepdim=True)) / temperature
    return centred - centred.logsumexp((2, 3), keepdim=True)
