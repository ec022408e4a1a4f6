"""AID's weight exp(-alpha * D) for every (level, image)."""

from __future__ import annotations

import math

import numpy as np

from .numeric import array, zeros


def weights(losses: np.ndarray, granularity: str, levels: int, images: int, alpha: float = 0.1) -> np.ndarray:
    """(L, N) from the teacher's losses (L, N): summed over levels per image, averaged over images per level, both, or neither."""
    d, out = losses.tolist(), zeros(levels, images)
    for level in range(levels):
        for n in range(images):
            if granularity == "image":
                exponent = math.fsum(d[k][n] for k in range(levels))
            elif granularity == "level":
                exponent = math.fsum(d[level]) / images
            elif granularity == "batch":
                exponent = math.fsum(d[k][m] for k in range(levels) for m in range(images)) / images
            else:
                exponent = d[level][n]
            out[level][n] = math.exp(-alpha * exponent)
    return array(out, levels, images)
