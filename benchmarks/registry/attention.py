"""`attention`: both attentions from one pass over x."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import functional

from . import published, vectorised
from .case import Case
from .entry import Entry, Inputs, pyramid

Result = tuple[list[Tensor], list[Tensor]]


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"x": pyramid(case, generator, device), "temperature": 0.5}


def eager(x: list[Tensor], temperature: float) -> Result:
    pairs = [vectorised.attention(level, temperature) for level in x]
    return [spatial for spatial, _ in pairs], [channel for _, channel in pairs]


def paper(x: list[Tensor], temperature: float) -> Result:
    """FGD's code: all images at once, |x| a tensor of its own."""
    pairs = [published.attention(level, temperature) for level in x]
    return [spatial for spatial, _ in pairs], [channel for _, channel in pairs]


ENTRIES = (
    Entry(
        name="attention",
        kind="primitive",
        inputs=inputs,
        call=functional.attention,
        eager=eager,
        paper=paper,
        # The gradient needs both softmaxes' sums and the sign of x: x again (1), written (1), with d inside.
        units={"forward": 1, "backward": 3, "backward_scaled": 3},
        differentiable="x",
    ),
)
