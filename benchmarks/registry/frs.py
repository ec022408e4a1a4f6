"""FRSLoss: features by a trained convolution, and class logits, both weighted by the teacher's best score."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import FRSLoss, functional

from .case import Case
from .entry import Entry, Inputs, pyramid
from .features import Parts, cells, total, trained
from .fgfi import ADAPTED
from .heads import CLASSES, cross_entropy, head_bytes, numbers, outputs, split

ALPHA, BETA = 0.1, 0.05


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made: Inputs = {}
    for who in ("student", "teacher"):
        made[who] = [*pyramid(case, generator, device), *numbers(case, generator, device, CLASSES, 2.0)]
    levels = len(case.level_sizes)
    parts = trained(FRSLoss(), made["student"][:levels], made["teacher"][:levels], generator)
    return {**made, "anchors": cells(case, device), "trained": parts}


def call(student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], trained: Parts) -> Tensor:
    (features_s, classes_s), (features_t, classes_t) = (split(x, 2) for x in (student, teacher))
    return functional.frs(features_s, features_t, outputs(classes_s, anchors), outputs(classes_t, anchors), trained=trained)


def eager(student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], trained: Parts) -> Tensor:
    rows = []
    for s, p_s, t, p_t, convolution in zip(*split(student, 2), *split(teacher, 2), trained.convolutions, strict=True):
        mask = p_t.float().amax(2).sigmoid()
        error = (t.float() - convolution(s.float())).square().sum(1).flatten(1)
        classes = cross_entropy(p_s.float(), p_t.float()).sum(2)
        rows.append(((ALPHA * error + BETA * classes) * mask).sum() / mask.sum())
    return total(rows)


def paper(student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], trained: Parts) -> Tensor:
    """As the released code: the mask as a map that the squared error and the cross-entropy of every class are multiplied by."""
    rows = []
    for s, p_s, t, p_t, convolution in zip(*split(student, 2), *split(teacher, 2), trained.convolutions, strict=True):
        n, _, h, w = s.shape
        scores = torch.sigmoid(p_t.float()).transpose(1, 2).view(n, -1, h, w)
        mask = torch.max(scores, dim=1).values
        error = torch.pow(t.float() - convolution(s.float()), 2) * mask[:, None]
        logits = p_s.float().transpose(1, 2).view(n, -1, h, w)
        classes = -(scores * torch.log(torch.sigmoid(logits)) + (1 - scores) * torch.log(torch.sigmoid(-logits))) * mask[:, None]
        rows += [ALPHA * error.sum() / mask.sum(), BETA * classes.sum() / mask.sum()]
    return total(rows)


def small_bytes(case: Case, mode: str) -> int:
    """Both class logits; for the gradient again, since the masks' sum divides it, and the gradient itself."""
    return (2 if mode == "forward" else 5) * head_bytes(case, CLASSES)


ENTRIES = (
    Entry(
        name="frs",
        kind="method",
        inputs=inputs,
        call=call,
        eager=eager,
        paper=paper,
        # The features' mask is of the logits, which are read first.
        units=ADAPTED,
        small_bytes=small_bytes,
        differentiable="student",
        losses=lambda: {"frs": FRSLoss()},
    ),
)
