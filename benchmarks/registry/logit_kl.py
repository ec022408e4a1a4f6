"""`logit_kl`: two networks' logits as distributions, read for the value, and read again for the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import functional

from .case import Case
from .entry import Entry, Inputs
from .logit_bce import logits


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """As many distributions of a pixel as divide its channels, of the four edges of a box."""
    return {**logits(case, generator, device), "temperature": 10.0, "groups": 4 if case.channels % 4 == 0 else 2}


def eager(s: list[Tensor], t: list[Tensor], weight: list[Tensor], temperature: float, groups: int) -> Tensor:
    """(L, N)"""
    rows = []
    for a, b, w in zip(s, t, weight, strict=True):
        log_p, log_q = ((x.float() / temperature).unflatten(1, (groups, -1)).log_softmax(2) for x in (a, b))
        rows.append((F.kl_div(log_p, log_q, reduction="none", log_target=True).sum((1, 2)) * w).sum((1, 2)))
    return torch.stack(rows)


def paper(s: list[Tensor], t: list[Tensor], weight: list[Tensor], temperature: float, groups: int) -> Tensor:
    """LD's code: the bins brought behind each other first, a row a distribution, image by image; it leaves the softmax' target as it is."""
    rows = []
    for a, b, w in zip(s, t, weight, strict=True):
        images = []
        for x, y, of_pixel in zip(a, b, w, strict=True):
            bins = x.shape[0] // groups
            own, other = (z.float().permute(1, 2, 0).reshape(-1, bins) / temperature for z in (x, y))
            error = F.kl_div(own.log_softmax(1), other.softmax(1), reduction="none").sum(1)
            images.append((error.view(-1, groups).sum(1) * of_pixel.flatten()).sum())
        rows.append(torch.stack(images))
    return torch.stack(rows)


ENTRIES = (
    Entry(
        name="logit_kl",
        kind="primitive",
        inputs=inputs,
        call=functional.logit_kl,
        eager=eager,
        paper=paper,
        # As of logit_bce.
        units={"forward": 2, "backward": 3, "backward_scaled": 5},
        differentiable="s",
    ),
)
