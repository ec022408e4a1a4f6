"""Outputs of two heads for the comparisons of the losses on them: as arrays for the loops, and as the library's HeadOutputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from oracle import cases
from oracle_support import SHAPES, anchors
from torch import Tensor

from kdkernels.outputs import HeadOutputs

CLASSES, BINS = 3, 6
Head = dict[str, list[np.ndarray]]


def head(
    seed: int, dtype: torch.dtype, shapes=SHAPES, distribution: bool = False, own: Sequence[np.ndarray] | None = None, shift: float = 4.0
) -> Head:
    """classes (N, A, K), deltas and boxes (N, A, 4) and, if wanted, bins (N, A, 4, bins) a level, in numbers that `dtype` holds.

    own: the anchors, near which the boxes are
    """
    rng = np.random.RandomState(7500 + seed)
    found: dict[str, list[np.ndarray]] = {"classes": [], "deltas": [], "boxes": []}
    if distribution:
        found["bins"] = []
    for level, shape in zip(anchors(shapes) if own is None else own, shapes, strict=True):
        count = (shape[0], len(level))
        found["classes"].append(1.5 * rng.randn(*count, CLASSES) - 0.5)
        found["deltas"].append(rng.randn(*count, 4))
        found["boxes"].append(level + shift * rng.uniform(-0.9, 0.9, (*count, 4)))
        if distribution:
            found["bins"].append(2.0 * rng.randn(*count, 4, BINS))
    return {part: cases.rounded(levels, dtype) for part, levels in found.items()}


def outputs(parts: Mapping[str, Sequence[Any]], dtype: torch.dtype, own: Sequence[np.ndarray], leaves: Sequence[str] = ()) -> HeadOutputs:
    """The library's form of a head; the parts named in `leaves` take gradients."""
    made = {part: cases.tensors(list(levels), dtype, requires_grad=part in leaves) for part, levels in parts.items()}
    where = cases.tensors(list(own), torch.float32)
    return HeadOutputs(made["classes"], made["deltas"], where, made["boxes"], made.get("bins"))


def parts_of(found: HeadOutputs) -> dict[str, list[Tensor]]:
    parts = {"classes": found.classification, "deltas": found.regression, "boxes": found.boxes}
    return parts if found.distribution is None else {**parts, "bins": found.distribution}


def lists(parts: Head) -> dict[str, list]:
    return {part: [level.tolist() for level in levels] for part, levels in parts.items()}
