"""FGFILoss: imitation near the objects' best anchors, by a trained convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import FGFILoss, functional

from .case import Case
from .entry import Entry, Inputs
from .features import Parts, cells, features_and_boxes, total, trained
from .settle import settle_rectified
from .vectorised import CHUNK

WEIGHT = 0.01
#: A trained convolution of 3 x 3 cells is one of the library's, which writes what it makes and has it read; the mask is known beforehand.
#: forward: S read, adapt(S) written, adapt(S) and T read (4).
#: backward: the pass that compares writes its gradient for d = 1 (1), the convolution reads that and writes the student's, d inside (2).
ADAPTED = {"forward": 4, "backward": 7, "backward_scaled": 7}


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = {**features_and_boxes(case, generator, device), "anchors": cells(case, device)}
    made["trained"] = trained(FGFILoss(), made["student_features"], made["teacher_features"], generator)
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_rectified(made["student_features"], made["trained"].convolutions)


def overlap(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(..., M, A): IoU of boxes (..., M, 4) with anchors (A, 4)."""
    boxes = boxes[..., None, :]
    width, height = (
        (torch.minimum(boxes[..., k + 2], anchors[:, k + 2]) - torch.maximum(boxes[..., k], anchors[:, k])).clamp(min=0) for k in (0, 1)
    )
    shared = width * height
    own, other = ((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (boxes, anchors))
    union = own + other - shared
    return torch.where(union == 0, 0, shared / torch.where(union == 0, 1, union))


def near(boxes: tuple[Tensor, Tensor], anchors: list[Tensor], features: list[Tensor]) -> list[Tensor]:
    """(N, H, W) a level: 1 where an anchor is near a box."""
    padded, counts = boxes
    real = torch.arange(padded.shape[1], device=padded.device) < counts[:, None]
    padded, every = torch.where(real[..., None], padded, 0), torch.cat(anchors).float()
    found = torch.zeros(padded.shape[0], len(every), dtype=torch.bool, device=padded.device)
    step = max(1, CHUNK // 4 // found.numel())
    for start in range(0, padded.shape[1], step):
        found = found | overlapping(overlap(padded[:, start : start + step], every)).any(1)
    return as_masks(found, features)


def as_masks(found: Tensor, features: list[Tensor]) -> list[Tensor]:
    """(N, A) of the anchors of all levels, one a cell, as the levels' masks."""
    levels = found.split([x.shape[2] * x.shape[3] for x in features], 1)
    return [level.reshape(-1, *x.shape[2:]).float() for level, x in zip(levels, features, strict=True)]


def overlapping(overlaps: Tensor) -> Tensor:
    return overlaps > 0.5 * overlaps.amax(-1, keepdim=True)


def eager(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    anchors: list[Tensor],
    trained: Parts,
) -> Tensor:
    rows = []
    masks = near(boxes, anchors, student_features)
    for s, t, mask, convolution in zip(student_features, teacher_features, masks, trained.convolutions, strict=True):
        error = (F.relu(convolution(s.float())) - t.float()).square().sum(1)
        rows.append(WEIGHT * (error * mask).sum() / (2 * mask.sum()).clamp(min=1))
    return total(rows)


def paper(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    anchors: list[Tensor],
    trained: Parts,
) -> Tensor:
    """As the released code: masks image by image and box by box, then the whole of the squared error times the mask."""
    rows, images = [], []
    every = torch.cat(anchors).float()
    for padded, count in zip(*boxes, strict=True):
        image = torch.zeros(len(every), dtype=torch.bool, device=every.device)
        for box in padded[: int(count)]:
            image |= overlapping(overlap(box, every))
        images.append(image)
    masks = as_masks(torch.stack(images), student_features)
    for s, t, mask, convolution in zip(student_features, teacher_features, masks, trained.convolutions, strict=True):
        norms = torch.clamp(mask.sum() * 2, min=1)
        error = torch.pow(F.relu(convolution(s.float())) - t.float(), 2) * mask[:, None]
        rows.append(error.sum() / norms * WEIGHT)
    return total(rows)


ENTRIES = (
    Entry(
        name="fgfi",
        kind="method",
        inputs=inputs,
        call=functional.fgfi,
        eager=eager,
        paper=paper,
        units=ADAPTED,
        differentiable="student_features",
        losses=lambda: {"fgfi": FGFILoss()},
        settle=settle,
    ),
)
