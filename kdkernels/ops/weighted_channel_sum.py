"""`weighted_channel_sum`: GKD's map before normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backend
from ..pyramid import Pyramid, as_pyramid, check_choice, level_shapes
from ..reference.weighted_channel_sum import weighted_channel_sum as reference

ACTIVATIONS = ("raw", "abs")
RECTIFIERS = ("abs", "relu", "none")
backend.register("reference", "weighted_channel_sum", reference)


def weighted_channel_sum(
    x: Pyramid, w: Sequence[Tensor], activation: str = "raw", rectify: str = "abs"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """r = rectify(sum_c w_c * activation(x_c)) and its extrema (GKD Eq. 2 and the inner part of Eq. 3).

    x: pyramid of (N, C, H, W); w: one (N, C) a level, or (N, C, H, W) for a weight per element. 16-bit, fp32 or fp64.
    Returns the maps (N, H, W), their minima (N,) and maxima (N,), each a list of L; fp32 (fp64 if x or w is).
    Raises ValueError, naming the level and both shapes, where w does not fit x.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("rectify", rectify, RECTIFIERS)
    levels, names = as_pyramid("x", x)
    if len(w) != len(levels):
        raise ValueError(f"w has {len(w)} levels, x has {len(levels)}: {level_shapes(levels, names)}")
    for level, weight, name in zip(levels, w, names, strict=True):
        if weight.shape not in (level.shape[:2], level.shape):
            raise ValueError(
                f"w, level {name}: got shape {tuple(weight.shape)}, wanted {tuple(level.shape[:2])} or x's shape {tuple(level.shape)}"
            )
    return backend.call("weighted_channel_sum", levels, levels, list(w), activation, rectify)
