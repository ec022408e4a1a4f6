"""`channel_mean`: read the gradients once."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import functional

from . import vectorised
from .case import Case
from .entry import Entry, Inputs, pyramid


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"x": pyramid(case, generator, device)}


def eager(x: list[Tensor]) -> list[Tensor]:
    return [vectorised.channel_weights(level) for level in x]


def paper(x: list[Tensor]) -> list[Tensor]:
    """Image by image."""
    return [torch.stack([image.float().mean((1, 2)) for image in level]) for level in x]


ENTRIES = (
    Entry(
        name="channel_mean",
        kind="primitive",
        inputs=inputs,
        call=functional.channel_mean,
        eager=eager,
        paper=paper,
        # No backward: GKD's weights are constants, only grad_mode="second_order" differentiates them, and that is the reference's alone.
        units={"forward": 1},
    ),
)
