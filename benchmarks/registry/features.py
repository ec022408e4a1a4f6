"""What the methods on two pyramids of features have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.losses.trainable import Trainable

from .case import Case
from .entry import Inputs, boxes, pyramid

#: A module with the trained parts of a loss, which a method's functions know by their names.
Parts = Any


def features(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"student_features": pyramid(case, generator, device), "teacher_features": pyramid(case, generator, device)}


def features_and_boxes(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {
        **features(case, generator, device),
        "boxes": boxes(case, generator, device),
        "image_size": case.image_size,
    }


def cells(case: Case, device: torch.device, sides: int = 1) -> list[Tensor]:
    """(H W, 4) xyxy in pixels a level: squares around its cells, row by row, of `sides` times their side; FCOS has the cells for anchors.

    Whole numbers: whoever fills the inputs anew or widens them leaves the grid as it is.
    """
    found = []
    for (rows, columns), stride in zip(case.level_sizes, case.strides, strict=True):
        y, x = torch.meshgrid(stride * torch.arange(rows), stride * torch.arange(columns), indexing="ij")
        low, high = -(sides - 1) * stride // 2, (sides + 1) * stride // 2
        found.append(torch.stack([x + low, y + low, x + high, y + high], 2).flatten(0, 1).to(device))
    return found


def trained(loss: Trainable, student: list[Tensor], teacher: list[Tensor], generator: torch.Generator) -> Parts:
    """The loss's parts with parameters for these features, drawn anew: what starts at 0 would do nothing.

    They are constants of a call, which returns the student's gradient alone. In evaluation mode, so that no buffer changes.
    """
    parts = loss.build(student, teacher).trainable
    assert parts is not None
    for parameter in parts.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.requires_grad_(False).copy_(scale * torch.randn(parameter.shape, generator=generator))
    return parts.eval()


def total(rows: list[Tensor]) -> Tensor:
    """The sum of every level's number."""
    return torch.stack(rows).sum()
