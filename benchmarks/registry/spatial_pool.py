"""`spatial_pool`: read x once for the context of a global context block; with a gradient, write that."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import functional

from .case import Case
from .entry import Entry, Inputs, pyramid


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    maps = [torch.randn(case.batch, *size, generator=generator).to(device) for size in case.level_sizes]
    return {"x": pyramid(case, generator, device), "a": maps, "normalize": "softmax"}


def eager(x: list[Tensor], a: list[Tensor], normalize: str) -> list[Tensor]:
    weights = [level.flatten(1).softmax(1) for level in a]
    return [torch.einsum("ncp,np->nc", level.flatten(2).float(), w) for level, w in zip(x, weights, strict=True)]


def paper(x: list[Tensor], a: list[Tensor], normalize: str) -> list[Tensor]:
    """GCNet's code: a matrix product of every image's pixels with its column of weights."""
    pooled = []
    for level, logits in zip(x, a, strict=True):
        column = torch.nn.functional.softmax(logits.flatten(1)[:, None], dim=2).unsqueeze(-1)
        pooled.append(torch.matmul(level.float().flatten(2)[:, None], column)[:, 0, :, 0])
    return pooled


ENTRIES = (
    Entry(
        name="spatial_pool",
        kind="primitive",
        inputs=inputs,
        call=functional.spatial_pool,
        eager=eager,
        paper=paper,
        # The gradient is the weights times d, whatever x holds: it is written (1) once d is known.
        units={"forward": 1, "backward": 2, "backward_scaled": 2},
        differentiable="x",
    ),
)
