"""ATSS positives and LD's valuable localisation region (methods.md 6.10) of one image, anchor by anchor."""

from __future__ import annotations

import math

from .overlap import centre, diou, iou

Boxes = list[list[float]]


def _near(level: Boxes, box: list[float], topk: int) -> list[int]:
    """Of equally near ones the first."""
    x, y = centre(box)
    apart = [(centre(anchor)[0] - x) ** 2 + (centre(anchor)[1] - y) ** 2 for anchor in level]
    return sorted(range(len(level)), key=lambda i: apart[i])[:topk]


def threshold(anchors: list[Boxes], box: list[float], topk: int = 9) -> float:
    """Mean + unbiased deviation of the IoU of the topk anchors of every level whose centres are nearest."""
    overlaps = [iou(level[i], box) for level in anchors for i in _near(level, box, topk)]
    middle = math.fsum(overlaps) / len(overlaps)
    spread = math.fsum((value - middle) ** 2 for value in overlaps)
    return middle + math.sqrt(spread / (len(overlaps) - 1))


def _holds(box: list[float], anchor: list[float]) -> bool:
    x, y = centre(anchor)
    return min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01


def positives(anchors: list[Boxes], boxes: Boxes, topk: int = 9) -> list[list[bool]]:
    """Of every level's anchors: among the nearest of some box, IoU at least its threshold, centre inside."""
    out = [[False] * len(level) for level in anchors]
    for box in boxes:
        least = threshold(anchors, box, topk)
        for level, own in zip(anchors, out, strict=True):
            for i in _near(level, box, topk):
                own[i] = own[i] or (iou(level[i], box) >= least and _holds(box, level[i]))
    return out


def region(anchors: list[Boxes], boxes: Boxes, topk: int = 9) -> list[list[float]]:
    """0.25 threshold <= DIoU < threshold for some box: the largest IoU with such a box; else 0."""
    out = [[0.0] * len(level) for level in anchors]
    for box in boxes:
        least = threshold(anchors, box, topk)
        for level, own in zip(anchors, out, strict=True):
            for i, anchor in enumerate(level):
                if 0.25 * least <= diou(anchor, box) < least:
                    own[i] = max(own[i], iou(anchor, box))
    return out
