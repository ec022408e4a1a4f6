"""DeFeat (methods.md 6.3): foreground and background apart, on features and on the logits of regions."""

from __future__ import annotations

import numpy as np

from . import boxes as box_oracle
from .layers import Level, aligned, pairs, size
from .logits import divergence
from .tape import Number, Rows, mean, split, square, total


def terms(
    s: list[Level],
    t: list[Level],
    parameters: dict,
    boxes: list[np.ndarray],
    image_size: tuple[int, int],
    alpha: float = 3.0,
    beta: float = 12.0,
    average: str = "half",
    prefix: str = "",
) -> dict[str, Rows]:
    """average: "half" divides the sums by max(1, 2 sum mask) and by L, "mean" by the number of elements; both masks count all channels."""
    masks = box_oracle.box_mask(boxes, image_size, [size(x)[2:] for x in t], "assigned")
    found = {}
    for term, coefficient in (("foreground", alpha), ("background", beta)):
        totals, numerators = [], []
        for level, (a, b) in enumerate(zip(s, t, strict=True)):
            count, channels, _, _ = size(b)
            chosen = (masks[level] if term == "foreground" else 1.0 - masks[level]).tolist()
            x = aligned(a, b, parameters, level, prefix)
            own = [total([square(d) * chosen[n][h][w] for _, h, w, d in pairs(x, b, n)]) for n in range(count)]
            elements = channels * sum(value for image in chosen for row in image for value in row)
            divisor = len(s) * max(1.0, 2.0 * elements) if average == "half" else elements
            totals.append(total(own) * (coefficient / divisor if divisor else 0.0))
            numerators.append(own)
        found[term] = split(totals, numerators)
    return found


def head(student: list[list[Number]], teacher: list[list[float]], foreground: list[bool], alpha: float = 2.0, beta: float = 2.0) -> Number:
    """alpha KL over the foreground rows + beta KL over the others, each the mean of its rows."""
    parts = []
    for wanted, coefficient in ((True, alpha), (False, beta)):
        rows = [divergence(b, a) for a, b, own in zip(student, teacher, foreground, strict=True) if bool(own) == wanted]
        if rows:
            parts.append(mean(rows) * coefficient)
    return total(parts)
