"""`logit_bce`: two networks' class logits, read for the value, and read again for the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import functional

from .case import Case
from .entry import Entry, Inputs, pyramid


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {**logits(case, generator, device), "beta": 1.0}


def logits(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits of both networks, as many channels as features have, and weights of the pixels."""
    return {
        "s": pyramid(case, generator, device),
        "t": pyramid(case, generator, device),
        "weight": [torch.rand(case.batch, *size, generator=generator).to(device) for size in case.level_sizes],
    }


def eager(s: list[Tensor], t: list[Tensor], weight: list[Tensor], beta: float) -> Tensor:
    """(L, N)"""
    rows = []
    for a, b, w in zip(s, t, weight, strict=True):
        x, target = a.float(), b.float().sigmoid()
        error = F.binary_cross_entropy_with_logits(x, target, reduction="none") * (x.sigmoid() - target).abs().pow(beta)
        rows.append((error.sum(1) * w).sum((1, 2)))
    return torch.stack(rows)


def paper(s: list[Tensor], t: list[Tensor], weight: list[Tensor], beta: float) -> Tensor:
    """CrossKD's code: the anchors' logits brought behind each other first, (N, H * W, K), image by image."""
    rows = []
    for a, b, w in zip(s, t, weight, strict=True):
        images = []
        for x, y, of_pixel in zip(a, b, w, strict=True):
            own, other = x.float().permute(1, 2, 0).flatten(0, 1), y.float().permute(1, 2, 0).flatten(0, 1)
            target = other.sigmoid()
            error = F.binary_cross_entropy_with_logits(own, target, reduction="none") * (own.sigmoid() - target).abs().pow(beta)
            images.append((error.sum(1) * of_pixel.flatten()).sum())
        rows.append(torch.stack(images))
    return torch.stack(rows)


ENTRIES = (
    Entry(
        name="logit_bce",
        kind="primitive",
        inputs=inputs,
        call=functional.logit_bce,
        eager=eager,
        paper=paper,
        # At another upstream gradient than 1 the gradient is scaled again (read and write) or made from s and t after the value (read 2).
        units={"forward": 2, "backward": 3, "backward_scaled": 5},
        differentiable="s",
    ),
)
