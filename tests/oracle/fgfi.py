"""FGFI (methods.md 6.2): imitation where an anchor of the position overlaps a box by more than half of the best of any level."""

from __future__ import annotations

import numpy as np

from .layers import Level, aligned, each, pairs, size
from .overlap import iou
from .tape import Rows, relu, split, square, total


def mask(anchors: list[np.ndarray], level: int, boxes: list[np.ndarray], count: int, height: int, width: int) -> list[list[list[float]]]:
    """(N, H, W) of one level: the anchors (H W k, 4) of a position are consecutive."""
    each_cell = len(anchors[level]) // (height * width)
    out = [[[0.0] * width for _ in range(height)] for _ in range(count)]
    for n in range(count):
        for box in boxes[n].tolist():
            best = max(iou(anchor, box) for own in anchors for anchor in own.tolist())
            for i, anchor in enumerate(anchors[level].tolist()):
                if best > 0 and iou(anchor, box) > 0.5 * best:
                    out[n][i // each_cell // width][i // each_cell % width] = 1.0
    return out


def terms(
    s: list[Level], t: list[Level], parameters: dict, anchors, boxes, weight: float = 0.01, average: str = "half", prefix: str = ""
) -> dict[str, Rows]:
    """average: "half" divides by 2 Npos (with the adapter and its ReLU), "mean" by Npos C (without)."""
    totals, numerators = [], []
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        count, channels, height, width = size(b)
        selected = mask(anchors, level, boxes, count, height, width)
        positions = sum(value for image in selected for row in image for value in row)
        name = f"{prefix}convolutions.{level}.weight"
        x = each(relu, aligned(a, b, parameters, level, prefix)) if name in parameters else a
        own = [total([square(d) * selected[n][h][w] for _, h, w, d in pairs(x, b, n)]) for n in range(count)]
        divisor = 2.0 * positions if average == "half" else positions * channels
        totals.append(total(own) * (weight / divisor if positions else 0.0))
        numerators.append(own)
    return {"imitation": split(totals, numerators)}
