"""CrossKDLoss: what the teacher's head says of the student's head features, class logits and decoded boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import CrossKDLoss, functional
from kdkernels.losses.assignment import assign

from .case import Case
from .entry import Entry, Inputs, boxes
from .features import cells, total
from .heads import CLASSES, boxes_at, cross_entropy, head_bytes, numbers, outputs, split
from .settle import settle_numbers


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    anchors = cells(case, device)
    made: Inputs = {}
    for who in ("student", "teacher"):
        made[who] = [*numbers(case, generator, device, CLASSES), *boxes_at(anchors, case, generator)]
    made |= {"anchors": anchors, "boxes": boxes(case, generator, device), "image_size": case.image_size}
    settle(made)
    return made


def settle(made: Inputs) -> None:
    levels = len(made["anchors"])
    settle_numbers(made["student"][:levels], made["teacher"][:levels])


def call(
    student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    (classes_s, boxes_s), (classes_t, boxes_t) = (split(x, 2) for x in (student, teacher))
    features = [x[:, :1, None] for x in classes_s]
    heads = outputs(classes_s, anchors, boxes_s), outputs(classes_t, anchors, boxes_t)
    return functional.crosskd(features, features, *heads, boxes, image_size)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (..., 4), pair by pair."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = sum((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)) - shared
    return shared / union - (hull - union) / hull


def eager(
    student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    """The anchors are assigned by the library's plain PyTorch."""
    positive = torch.cat(assign([a.float() for a in anchors], boxes).positive, 1)
    rows = []
    for classes_s, boxes_s, classes_t, boxes_t in zip(*split(student, 2), *split(teacher, 2), strict=True):
        p_s, p_t = classes_s.float(), classes_t.float()
        classes = (p_s.sigmoid() - p_t.sigmoid()).abs() * cross_entropy(p_s, p_t)
        places = p_t.amax(2).sigmoid() * (1 - overlap(boxes_s.float(), boxes_t.float()))
        rows.append(classes.sum() + places.sum())
    return total(rows) / positive.sum(1).clamp(min=1).sum()


def paper(
    student: list[Tensor], teacher: list[Tensor], anchors: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    """As the released code: the boxes' loss image by image, of all levels."""
    positive = torch.cat(assign([a.float() for a in anchors], boxes).positive, 1)
    count = sum(max(int(image.sum()), 1) for image in positive)
    (classes_s, boxes_s), (classes_t, boxes_t) = ([torch.cat(x, 1).float() for x in split(y, 2)] for y in (student, teacher))
    rows = []
    for p_s, b_s, p_t, b_t in zip(classes_s, boxes_s, classes_t, boxes_t, strict=True):
        target = torch.sigmoid(p_t)
        scale = torch.abs(torch.sigmoid(p_s) - target)
        rows.append((cross_entropy(p_s, p_t) * scale.pow(1.0)).sum() / count)
        rows.append(((1 - overlap(b_s, b_t)) * target.max(dim=1).values).sum() / count)
    return total(rows)


def small_bytes(case: Case, mode: str) -> int:
    """Both networks' logits and boxes; the gradient for d = 1 from the same pass, for another d they are read again."""
    return {"forward": 2, "backward": 3}.get(mode, 5) * head_bytes(case, CLASSES + 4)


ENTRIES = (
    Entry(
        name="crosskd",
        kind="method",
        inputs=inputs,
        call=call,
        eager=eager,
        paper=paper,
        # No features. The number of positive anchors is known beforehand.
        units={"forward": 0, "backward": 0, "backward_scaled": 0},
        small_bytes=small_bytes,
        differentiable="student",
        losses=lambda: {"crosskd": CrossKDLoss()},
        settle=settle,
    ),
)
