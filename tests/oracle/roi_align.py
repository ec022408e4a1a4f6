"""RoIAlign (He et al., ICCV 2017) with half-pixel alignment and as many samples a bin as it is cells long."""

from __future__ import annotations

import math

from .tape import Number, dot, mean

Plane = list[list[Number]]


def _sample(plane: Plane, y: float, x: float) -> Number:
    """Bilinear; 0 further than a cell outside, borders clamped."""
    height, width = len(plane), len(plane[0])
    if y < -1.0 or y > height or x < -1.0 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    return dot(
        [plane[top][left], plane[top][right], plane[below][left], plane[below][right]],
        [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx],
    )


def roi_align(image: list[Plane], box: list[float], scale: float, resolution: int = 10) -> list[Number]:
    """The box (xyxy in pixels) of one image's planes, flattened (C, resolution, resolution)."""
    left, top = box[0] * scale - 0.5, box[1] * scale - 0.5
    bin_w, bin_h = (box[2] - box[0]) * scale / resolution, (box[3] - box[1]) * scale / resolution
    across, down = math.ceil(bin_w), math.ceil(bin_h)
    out = []
    for plane in image:
        for i in range(resolution):
            for j in range(resolution):
                samples = [
                    _sample(plane, top + i * bin_h + (a + 0.5) * bin_h / down, left + j * bin_w + (b + 0.5) * bin_w / across)
                    for a in range(down)
                    for b in range(across)
                ]
                out.append(mean(samples) if samples else 0.0)
    return out
