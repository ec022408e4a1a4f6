"""MGDLoss: the teacher's features from what is left of the student's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import MGDLoss, functional

from . import random_mask
from .case import Case
from .entry import Entry, Inputs
from .features import Parts, features, total, trained
from .settle import settle_rectified

ALPHA = 2e-5
#: Share of the cells that are masked.
RATIO = MGDLoss().ratio


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = features(case, generator, device)
    made["trained"] = trained(MGDLoss(), made["student_features"], made["teacher_features"], generator)
    settle(made)
    return made


def settle(made: Inputs) -> None:
    parts = made["trained"]
    # Which cells are masked depends on a level's place.
    kept = random_mask.eager([torch.ones_like(x[:, :1]) for x in made["student_features"]], parts.state, parts.ratio)
    settle_rectified(made["student_features"], [_hidden(g[0], k) for g, k in zip(parts.generators, kept, strict=True)])


def _hidden(convolution: nn.Module, kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: convolution(x * kept)


def eager(student_features: list[Tensor], teacher_features: list[Tensor], trained: Parts) -> Tensor:
    masked = random_mask.eager(student_features, trained.state, trained.ratio)
    rows = []
    for x, t, (first, _, last) in zip(masked, teacher_features, trained.generators, strict=True):
        rows.append((last(F.relu(first(x.float()))) - t.float()).square().sum())
    return ALPHA * total(rows) / student_features[0].shape[0]


def paper(student_features: list[Tensor], teacher_features: list[Tensor], trained: Parts) -> Tensor:
    """As the released code."""
    masked = random_mask.paper(student_features, trained.state, trained.ratio)
    rows = []
    for x, t, (first, _, last) in zip(masked, teacher_features, trained.generators, strict=True):
        made = last(torch.relu(first(x.float())))
        rows.append(F.mse_loss(made, t.float(), reduction="sum") / len(x) * ALPHA)
    return total(rows)


ENTRIES = (
    Entry(
        name="mgd",
        kind="method",
        inputs=inputs,
        call=functional.mgd,
        eager=eager,
        paper=paper,
        # Convolutions as in fgfi.py; the mask and the ReLU are of their passes. forward: S read but for what is masked, as in
        # random_mask.py, the first's result written and read, the second's too, T read (6 less the masked share). backward: the gradient
        # of that written and read, the inner one written behind the ReLU, which is read for its signs, and read, the student's written, 0
        # where it is masked (6).
        units={"forward": 6 - RATIO, "backward": 12 - RATIO, "backward_scaled": 12 - RATIO},
        differentiable="student_features",
        losses=lambda: {"mgd": MGDLoss()},
        settle=settle,
    ),
)
