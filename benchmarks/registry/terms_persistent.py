"""GKD + BMFI in one launch of the native backend, whatever was measured of it; other backends do the same by their passes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused
from .case import Case
from .entry import Entry

NAME = "terms_persistent"


def one_launch(**given: object) -> Tensor:
    # Not above: `compare` measures versions of kdkernels that have no such function.
    from kdkernels.backend import assigned

    with assigned(NAME, "native"):
        return fused.one_call(**given)


def absent(backend: str, case: Case, device: torch.device) -> str:
    """Where the native backend takes passes too, what they take would pass for the time of the one launch."""
    if backend != "native":
        return ""
    if device.type != "cuda":
        return "one launch is for a GPU"
    return "fp16 goes by passes" if case.dtype == "fp16" else ""


ENTRIES = (
    Entry(
        name=NAME,
        kind="primitive",
        inputs=fused.inputs,
        call=one_launch,
        eager=fused.eager,
        paper=fused.paper,
        # Both gradients (2), both features, once from memory and again from the cache (2), and the gradient (1).
        units={"backward": 5},
        differentiable="student_features",
        absent=absent,
        settle=fused.settle,
    ),
)
