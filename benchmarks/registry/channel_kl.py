"""`channel_kl`: read s and t, write the gradient to s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import functional

from .case import Case
from .entry import Entry, Inputs, pyramid


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"s": pyramid(case, generator, device), "t": pyramid(case, generator, device), "temperature": 1.0}


def eager(s: list[Tensor], t: list[Tensor], temperature: float) -> Tensor:
    """(L, N)"""
    rows = []
    for a, b in zip(s, t, strict=True):
        log_q, log_p = ((x.float() / temperature).flatten(2).log_softmax(2) for x in (a, b))
        rows.append((log_p.exp() * (log_p - log_q)).sum((1, 2)))
    return torch.stack(rows)


def paper(s: list[Tensor], t: list[Tensor], temperature: float) -> Tensor:
    """CWD's code: channels as rows of a matrix, softmax of the teacher's and log-softmax of both."""
    rows = []
    for a, b in zip(s, t, strict=True):
        n, c, h, w = a.shape
        x, y = a.float().reshape(n * c, h * w) / temperature, b.float().reshape(n * c, h * w) / temperature
        p = F.softmax(y, dim=1)
        error = torch.sum(p * F.log_softmax(y, dim=1) - p * F.log_softmax(x, dim=1), dim=1)
        rows.append(error.view(n, c).sum(1))
    return torch.stack(rows)


ENTRIES = (
    Entry(
        name="channel_kl",
        kind="primitive",
        inputs=inputs,
        call=functional.channel_kl,
        eager=eager,
        paper=paper,
        # The gradient needs both softmaxes' sums: s and t again (2), written (1), with d inside.
        units={"forward": 2, "backward": 5, "backward_scaled": 5},
        differentiable="s",
    ),
)
