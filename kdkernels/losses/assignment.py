"""Which anchors belong to objects: ATSS positives and the valuable localisation region of LD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pyramid import accumulate, quotient
from ..reference.box_mask import Boxes, is_padded

#: Of every level the anchors nearest to a box are its candidates.
NEAREST = 9
#: An anchor is inside of a box when its centre is this many pixels away from each side.
INSIDE = 0.01
#: The region's DIoU starts at this part of the box's threshold.
REGION = 0.25


class Assignment(NamedTuple):
    """Of every level, for each image and anchor, (N, A_l)."""

    positive: list[Tensor]  # bool
    region: list[Tensor]  # the IoU that an anchor of the region counts with, else 0


@torch.no_grad()
def assign(anchors: Sequence[Tensor], boxes: Boxes) -> Assignment:
    """Adaptive training sample selection (arXiv 1912.02424) and LD's region (arXiv 2102.12252), as in HikariTJU/LD.

    anchors: (A_l, 4) xyxy in pixels a level; boxes: list of (n_i, 4) xyxy in pixels, or (padded (N, M, 4), counts (N,)).

    The candidates of a box are, on each level, the 9 anchors whose centres are nearest to its own (of equally near ones the first). Its
    threshold is the mean plus the unbiased standard deviation of the candidates' IoU with it (one candidate: without deviation).
    positive: a candidate of some box with IoU at or above its threshold, its centre more than 0.01 pixels inside the box.
    region:   any anchor with threshold / 4 <= DIoU < threshold for some box; it counts with the largest IoU with such a box.

    In fp32, fp64 if the anchors are. A box without area has neither.
    """
    every = torch.cat([accumulate(level) for level in anchors])
    counts = [len(level) for level in anchors]
    images = [_assign_one(every, image, counts) for image in _padded(boxes, every)]
    positive = torch.stack([own for own, _ in images]) if images else every.new_zeros(0, len(every), dtype=torch.bool)
    region = torch.stack([own for _, own in images]) if images else every.new_zeros(0, len(every))
    return Assignment(list(positive.split(counts, 1)), list(region.split(counts, 1)))


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (..., M, A) of boxes (..., M, 4) and (A, 4); 0 where both have no area."""
    rows = a[..., None, :]
    # An axis at a time: the pairs are many.
    width, height = ((torch.minimum(rows[..., k + 2], b[:, k + 2]) - torch.maximum(rows[..., k], b[:, k])).clamp(min=0) for k in (0, 1))
    shared = width * height
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (rows, b)]
    return quotient(shared, areas[0] + areas[1] - shared)


def generalized_overlap(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (..., 4) and (..., 4), pair by pair (arXiv 1902.09630): IoU - (hull - union) / hull; of two points 0."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    union = area_a + area_b - shared
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return quotient(shared, union) - quotient(hull - union, hull)


def _padded(boxes: Boxes, like: Tensor) -> Tensor:
    """(N, M, 4), M at least 1, in the type of `like`; rows without a box are 0, a box without area."""
    if is_padded(boxes):
        padded, counts = boxes[0].to(like), boxes[1].to(like.device)
        padded = torch.where((torch.arange(padded.shape[1], device=like.device) < counts[:, None])[:, :, None], padded, 0)
    elif len(boxes):
        padded = torch.nn.utils.rnn.pad_sequence([b.to(like) for b in boxes], batch_first=True)
    else:
        padded = like.new_zeros(0, 1, 4)
    return padded if padded.shape[1] else F.pad(padded, (0, 0, 0, 1))


def _assign_one(anchors: Tensor, boxes: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """positive and region (A,) of anchors (A, 4) for the boxes (M, 4) of one image."""
    iou = overlaps(boxes, anchors)
    centres, own = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    squared = (centres - own[:, None]).square().sum(2)
    candidates = _nearest(squared, counts)
    chosen = iou.gather(1, candidates)
    deviation = chosen.std(1) if chosen.shape[1] > 1 else torch.zeros_like(chosen[:, 0])
    threshold = (chosen.mean(1) + deviation)[:, None]

    inside = torch.cat([centres - boxes[:, None, :2], boxes[:, None, 2:] - centres], 2).amin(2) > INSIDE
    positive = torch.zeros_like(inside).scatter_(1, candidates, chosen >= threshold) & inside

    hull = torch.maximum(boxes[:, None, 2:], anchors[:, 2:]) - torch.minimum(boxes[:, None, :2], anchors[:, :2])
    diou = iou - quotient(squared, hull.square().sum(2))
    valuable = (diou < threshold) & (diou >= REGION * threshold)
    return positive.any(0), torch.where(valuable, iou, 0).amax(0)


def _nearest(squared: Tensor, counts: Sequence[int]) -> Tensor:
    """Per box (M, A), the indices of the NEAREST smallest of every level, (M, candidates).

    Equal distances are the rule on a grid, and topk leaves open which of them it takes: the order is that of one integer, the bits of the
    fp32 distance in front of the index.
    """
    index = torch.arange(squared.shape[1], device=squared.device)
    keys = (squared.float().view(torch.int32).long() << 32) | index
    return torch.cat([level.topk(min(NEAREST, level.shape[1]), 1, largest=False).indices for level in keys.split(list(counts), 1)], 1) + (
        _starts(counts, index)
    )


def _starts(counts: Sequence[int], index: Tensor) -> Tensor:
    """What brings the candidates' indices from their level's to those of all levels."""
    starts = [sum(counts[:level]) for level in range(len(counts))]
    return torch.cat([index.new_full((min(NEAREST, count),), start) for count, start in zip(counts, starts, strict=True)])
