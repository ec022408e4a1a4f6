"""FitNets-style plain imitation: weight / (N C H W) * sum (s - t)^2."""

from __future__ import annotations

from .layers import Level, size, squares
from .tape import Rows


def terms(s: list[Level], t: list[Level], weight: float = 1.0) -> dict[str, Rows]:
    rows = []
    for a, b in zip(s, t, strict=True):
        count, channels, height, width = size(b)
        rows.append([squares(a, b, n) * (weight / (count * channels * height * width)) for n in range(count)])
    return {"imitation": rows}
