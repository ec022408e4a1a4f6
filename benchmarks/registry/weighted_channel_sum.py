"""`weighted_channel_sum`: read x, write maps a channel wide; with a gradient, write that."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import functional

from . import vectorised
from .case import Case
from .entry import Entry, Inputs, pyramid
from .settle import settle_features

Result = tuple[list[Tensor], list[Tensor], list[Tensor]]


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = {
        "x": pyramid(case, generator, device),
        "w": [torch.randn(case.batch, case.channels, generator=generator).to(device) for _ in case.level_sizes],
    }
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_features(made["x"], made["w"])


def eager(x: list[Tensor], w: list[Tensor]) -> Result:
    maps = [vectorised.channel_sum(level, weight).abs() for level, weight in zip(x, w, strict=True)]
    return maps, [r.amin((1, 2)) for r in maps], [r.amax((1, 2)) for r in maps]


def paper(x: list[Tensor], w: list[Tensor]) -> Result:
    """Image by image, as grad-cam does it."""
    maps = []
    for level, weight in zip(x, w, strict=True):
        maps.append([(k[:, None, None] * image.float()).sum(0).abs() for image, k in zip(level, weight, strict=True)])
    extrema = [[torch.stack([f(r) for r in images]) for images in maps] for f in (torch.min, torch.max)]
    return [torch.stack(images) for images in maps], extrema[0], extrema[1]


ENTRIES = (
    Entry(
        name="weighted_channel_sum",
        kind="primitive",
        inputs=inputs,
        call=functional.weighted_channel_sum,
        eager=eager,
        paper=paper,
        # The gradient w_c * sign * dr does not depend on x but through the sign of a map that is there: it is written (1) once d is known.
        units={"forward": 1, "backward": 2, "backward_scaled": 2},
        differentiable="x",
        settle=settle,
    ),
)
