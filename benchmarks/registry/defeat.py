"""DeFeatLoss: objects and background apart, by a trained convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import DeFeatLoss, functional

from . import regions
from .case import Case
from .entry import Entry, Inputs
from .features import Parts, features_and_boxes, total, trained
from .fgfi import ADAPTED

FACTORS = (3.0, 12.0)


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = features_and_boxes(case, generator, device)
    return {**made, "trained": trained(DeFeatLoss(), made["student_features"], made["teacher_features"], generator)}


def eager(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    trained: Parts,
) -> Tensor:
    masks = regions.assigned(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
    rows = []
    for s, t, mask, convolution in zip(student_features, teacher_features, masks, trained.convolutions, strict=True):
        weight: Tensor | float = 0.0
        for factor, part in zip(FACTORS, (mask, 1 - mask), strict=True):
            weight = weight + factor * part / (2 * s.shape[1] * part.sum()).clamp(min=1)
        rows.append(((convolution(s.float()) - t.float()).square().sum(1) * weight).sum())
    return total(rows) / len(rows)


def paper(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    trained: Parts,
) -> Tensor:
    """As the released code: masks box by box, in as many channels as the features have; both parts from copies of their own."""
    masks = regions.assigned_by_box(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
    rows = []
    for s, t, level, convolution in zip(student_features, teacher_features, masks, trained.convolutions, strict=True):
        mask = level[:, None].repeat(1, s.shape[1], 1, 1)
        error = torch.pow(convolution(s.float()) - t.float(), 2)
        for factor, part in zip(FACTORS, (mask, 1 - mask), strict=True):
            rows.append(factor * (error * part).sum() / torch.clamp(2 * part.sum(), min=1) / len(masks))
    return total(rows)


ENTRIES = (
    Entry(
        name="defeat",
        kind="method",
        inputs=inputs,
        call=functional.defeat,
        eager=eager,
        paper=paper,
        # Both parts' masks are known beforehand: one pass compares.
        units=ADAPTED,
        differentiable="student_features",
        losses=lambda: {"defeat": DeFeatLoss()},
    ),
)
