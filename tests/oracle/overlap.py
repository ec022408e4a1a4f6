"""Overlap of boxes xyxy: intersection over union, with centre distance (DIoU), and the generalised one (GIoU)."""

from __future__ import annotations

from .tape import Number, constant, largest, smallest, square

Box = list[Number]


def area(box: Box) -> Number:
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(a: Box, b: Box) -> Number:
    width, height = smallest([a[2], b[2]]) - largest([a[0], b[0]]), smallest([a[3], b[3]]) - largest([a[1], b[1]])
    return width * height if constant(width) > 0 and constant(height) > 0 else 0.0


def iou(a: Box, b: Box) -> Number:
    shared = _intersection(a, b)
    union = area(a) + area(b) - shared
    return shared / union if constant(union) > 0 else 0.0


def _hull(a: Box, b: Box) -> tuple[Number, Number]:
    return largest([a[2], b[2]]) - smallest([a[0], b[0]]), largest([a[3], b[3]]) - smallest([a[1], b[1]])


def centre(box: Box) -> tuple[Number, Number]:
    return (box[0] + box[2]) / 2.0, (box[1] + box[3]) / 2.0


def diou(a: Box, b: Box) -> Number:
    """IoU - (distance of the centres / diagonal of the box around both)^2."""
    width, height = _hull(a, b)
    (ax, ay), (bx, by) = centre(a), centre(b)
    return iou(a, b) - (square(ax - bx) + square(ay - by)) / (square(width) + square(height))


def giou(a: Box, b: Box) -> Number:
    """IoU - the share of the box around both that neither covers."""
    shared = _intersection(a, b)
    union = area(a) + area(b) - shared
    width, height = _hull(a, b)
    hull = width * height
    return shared / union - (hull - union) / hull
