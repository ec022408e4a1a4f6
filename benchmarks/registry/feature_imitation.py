"""`feature_imitation`: read s and t, write the gradient to s."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import functional

from . import published, vectorised
from .case import Case
from .entry import Entry, Inputs, pyramid


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    sizes = case.level_sizes
    return {
        "s": pyramid(case, generator, device),
        "t": pyramid(case, generator, device),
        "spatial": [torch.rand(case.batch, *size, generator=generator).to(device) for size in sizes],
        "channel": [torch.rand(case.batch, case.channels, generator=generator).to(device) for _ in sizes],
    }


def eager(s: list[Tensor], t: list[Tensor], spatial: list[Tensor], channel: list[Tensor]) -> Tensor:
    """(L, N)"""
    return torch.stack([vectorised.imitation(*level) for level in zip(s, t, spatial, channel, strict=True)])


def paper(s: list[Tensor], t: list[Tensor], spatial: list[Tensor], channel: list[Tensor]) -> Tensor:
    """Image by image, both features multiplied by the roots of both weights, as FGD's code does it."""
    rows = []
    for a, b, m, w in zip(s, t, spatial, channel, strict=True):
        images = zip(a, b, m, w, strict=True)
        rows.append(torch.stack([published.weighted_error(x, y, [mask, k[:, None, None]]) for x, y, mask, k in images]))
    return torch.stack(rows)


ENTRIES = (
    Entry(
        name="feature_imitation",
        kind="primitive",
        inputs=inputs,
        call=functional.feature_imitation,
        eager=eager,
        paper=paper,
        # At another upstream gradient than 1 the gradient is scaled again (read and write) or made from s and t after the value (read 2).
        units={"forward": 2, "backward": 3, "backward_scaled": 5},
        differentiable="s",
    ),
)
