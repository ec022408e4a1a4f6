"""`box_mask`: boxes in, masks out."""

from __future__ import annotations

import torch

from kdkernels import functional

from . import published, vectorised
from .case import Case
from .entry import Entry, Inputs, boxes


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"boxes": boxes(case, generator, device), "image_size": case.image_size, "level_sizes": case.level_sizes}


def small_bytes(case: Case, mode: str) -> int:
    """fp32 masks written, fp32 boxes and int64 counts read."""
    return case.batch * (4 * case.pixels + 16 * case.boxes + 8)


ENTRIES = (
    Entry(
        name="box_mask",
        kind="primitive",
        inputs=inputs,
        call=functional.box_mask,
        eager=vectorised.box_masks,
        paper=published.box_masks,
        units={"forward": 0},
        small_bytes=small_bytes,
    ),
)
