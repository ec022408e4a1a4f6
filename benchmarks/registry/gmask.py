"""GmaskLoss: FGD under windows, gaussian (gmask) and exponential (emask), without background."""

from __future__ import annotations

from functools import partial

from kdkernels import GmaskLoss, functional

from . import fgd, published, vectorised
from .entry import Entry

ENTRIES = (
    Entry(
        name="gmask",
        kind="method",
        inputs=fgd.inputs,
        call=functional.gmask,
        eager=fgd.eager_with(vectorised.box_masks, 0),
        paper=fgd.paper_with(published.box_masks, 0),
        units=fgd.UNITS,
        differentiable="student_features",
        losses=lambda: {"gmask": GmaskLoss()},
        settle=fgd.settle,
    ),
    Entry(
        name="emask",
        kind="method",
        inputs=fgd.inputs,
        call=partial(functional.gmask, mask="exponential"),
        eager=fgd.eager_with(partial(vectorised.box_masks, profile=vectorised.exponential), 0),
        paper=fgd.paper_with(partial(published.box_masks, profile=published.exponential), 0),
        units=fgd.UNITS,
        differentiable="student_features",
        losses=lambda: {"emask": GmaskLoss(mask="exponential")},
        settle=fgd.settle,
    ),
)
