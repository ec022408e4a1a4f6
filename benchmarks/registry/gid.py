"""GIDLoss: regions of the instances on which both networks differ, their relations, and the answers there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, roi_align

from kdkernels import GIDLoss, functional

from .case import Case
from .entry import Entry, Inputs, pyramid
from .features import cells
from .fgfi import overlap
from .heads import CLASSES, boxes_at, cross_entropy, head_bytes, numbers, outputs, split

FEATURE, RELATION, CLASSIFICATION, REGRESSION = 5e-4, 40.0, 0.1, 1.0
#: Cells of a region's side, and an anchor's side in strides, as RetinaNet has it.
SIDE, ANCHOR = 10, 4


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Of each network features, class logits and regression; the boxes, which have no gradient, apart."""
    anchors = cells(case, device, ANCHOR)
    made: Inputs = {"anchors": anchors}
    for who in ("student", "teacher"):
        head = [*numbers(case, generator, device, CLASSES), *numbers(case, generator, device, 4)]
        made |= {who: [*pyramid(case, generator, device), *head], f"{who}_boxes": boxes_at(anchors, case, generator)}
    return made


def call(
    student: list[Tensor], teacher: list[Tensor], student_boxes: list[Tensor], teacher_boxes: list[Tensor], anchors: list[Tensor]
) -> Tensor:
    (f_s, p_s, r_s), (f_t, p_t, r_t) = (split(x, 3) for x in (student, teacher))
    heads = outputs(p_s, anchors, student_boxes, regression=r_s), outputs(p_t, anchors, teacher_boxes, regression=r_t)
    return functional.gid(f_s, f_t, *heads)


@torch.no_grad()
def instances(*heads: list[Tensor]) -> list[Tensor]:
    """(at most 10, 4) an image; heads: logits and boxes of the student, and of the teacher."""
    p_s, b_s, p_t, b_t = (torch.cat(x, 1).float() for x in heads)
    sigma_s, sigma_t = p_s.sigmoid(), p_t.sigmoid()
    boxes = torch.where((sigma_t.amax(2) > sigma_s.amax(2))[:, :, None], b_t, b_s)
    found = []
    for own, score in zip(boxes, (sigma_t - sigma_s).abs().amax(2), strict=True):
        best = score.argsort(descending=True, stable=True)[:3000]
        found.append(own[best][nms(own[best], score[best], 0.3)[:10]])
    return found


def _strides(anchors: list[Tensor]) -> list[int]:
    return [int(a[0, 2] - a[0, 0]) // ANCHOR for a in anchors]


def _level_of(boxes: Tensor, strides: list[int]) -> Tensor:
    first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
    edge = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    return (4 + (edge / 224).log2()).floor().clamp(first, last).long() - first


def pooled_by_level(levels: list[Tensor], boxes: list[Tensor], strides: list[int]) -> Tensor:
    """(K, C * 100)"""
    owner = torch.cat([own.new_full((len(own), 1), n) for n, own in enumerate(boxes)])
    every = torch.cat(boxes)
    place = _level_of(every, strides)
    made = levels[0].new_zeros(len(every), levels[0].shape[1] * SIDE**2, dtype=torch.float32)
    for level, (x, stride) in enumerate(zip(levels, strides, strict=True)):
        chosen = (place == level).nonzero()[:, 0]
        regions = roi_align(x.float(), torch.cat([owner, every], 1)[chosen], SIDE, 1 / stride, 0, True)
        made = made.index_copy(0, chosen, regions.flatten(1))
    return made


def pooled_by_image(levels: list[Tensor], boxes: list[Tensor], strides: list[int]) -> Tensor:
    return torch.cat([pooled_by_level([x[n : n + 1] for x in levels], [own], strides) for n, own in enumerate(boxes)])


def distances(regions: Tensor) -> Tensor:
    apart = torch.cdist(regions, regions, compute_mode="donot_use_mm_for_euclid_dist")
    return apart / (apart.sum() / (len(regions) ** 2 - len(regions)))


def distances_by_pair(regions: Tensor) -> Tensor:
    """Of different ones, one after the other."""
    apart = torch.stack([torch.dist(a, b) for i, a in enumerate(regions) for j, b in enumerate(regions) if i != j])
    return apart / apart.mean()


def loss(
    pooled: Callable[..., Tensor],
    related: Callable[[Tensor], Tensor],
    student: list[Tensor],
    teacher: list[Tensor],
    student_boxes: list[Tensor],
    teacher_boxes: list[Tensor],
    anchors: list[Tensor],
) -> Tensor:
    """With these ways to the regions and to their distances."""
    (f_s, p_s, r_s), (f_t, p_t, r_t) = (split(x, 3) for x in (student, teacher))
    boxes, strides = instances(p_s, student_boxes, p_t, teacher_boxes), _strides(anchors)
    own, theirs = (pooled(x, boxes, strides) for x in (f_s, f_t))
    count = len(own)
    loss = FEATURE * F.mse_loss(own, theirs, reduction="sum") / (count * SIDE**2)
    if count > 2:
        loss = loss + RELATION * F.smooth_l1_loss(related(own), related(theirs), reduction="sum") / (count**2 - count)
    every = torch.cat(anchors).float()
    matched = torch.stack([(overlap(box, every) >= 0.5).any(0) for box in boxes])
    s, t, a, b = (torch.cat(x, 1)[matched].float() for x in (p_s, p_t, r_s, r_t))
    answers = CLASSIFICATION * cross_entropy(s, t).sum() + REGRESSION * (a - b).abs().sum()
    return loss + answers / max(len(s), 1)


eager = partial(loss, pooled_by_level, distances)
#: Image by image, pair by pair.
paper = partial(loss, pooled_by_image, distances_by_pair)


def small_bytes(case: Case, mode: str) -> int:
    """Both class logits for the scores; what is read of the few regions, boxes and answers is not counted. The gradient is written."""
    return 2 * head_bytes(case, CLASSES) + (0 if mode == "forward" else head_bytes(case, CLASSES + 4))


def absent(provider: str, case: Case, device: torch.device) -> str:
    return "how many boxes are left of an image is known when it has run: no one graph" if provider.startswith("compile") else ""


ENTRIES = (
    Entry(
        name="gid",
        kind="method",
        inputs=inputs,
        call=call,
        eager=eager,
        paper=paper,
        # The gradient of the features is written, mostly zeros (1).
        units={"forward": 0, "backward": 1, "backward_scaled": 1},
        small_bytes=small_bytes,
        differentiable="student",
        losses=lambda: {"gid": GIDLoss()},
        absent=absent,
    ),
)
