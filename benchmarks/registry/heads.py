"""What the methods on the outputs of dense heads have in common.

A network's tensors are one list, `student` and `teacher`: its features where they take part, then class logits, then what else its head
says, each of all levels. So a call returns the gradient of all that it compares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.outputs import HeadOutputs

from .case import DTYPES, Case

#: Of COCO.
CLASSES = 80


def numbers(case: Case, generator: torch.Generator, device: torch.device, width: int, scale: float = 1.0) -> list[Tensor]:
    """Random levels (N, H W, width)."""
    levels = [scale * torch.randn(case.batch, rows * columns, width, generator=generator) for rows, columns in case.level_sizes]
    return [x.to(device, DTYPES[case.dtype]) for x in levels]


def boxes_at(anchors: list[Tensor], case: Case, generator: torch.Generator) -> list[Tensor]:
    """Decoded boxes (N, H W, 4), xyxy in pixels: up to 0.4 of the side larger than the anchors, square ones."""
    found = []
    for a in anchors:
        growth = 0.2 * torch.rand(case.batch, len(a), 4, generator=generator) * torch.tensor([-1.0, -1, 1, 1])
        found.append((a + (a[:, 2:3] - a[:, :1]) * growth.to(a.device)).to(DTYPES[case.dtype]))
    return found


def split(tensors: list[Tensor], kinds: int) -> list[list[Tensor]]:
    """The levels of each kind."""
    levels = len(tensors) // kinds
    return [tensors[k * levels : (k + 1) * levels] for k in range(kinds)]


def outputs(
    classification: list[Tensor],
    anchors: list[Tensor],
    boxes: list[Tensor] | None = None,
    distribution: list[Tensor] | None = None,
    regression: list[Tensor] | None = None,
) -> HeadOutputs:
    """One anchor a cell; distribution: (N, H W, 4 bins)."""
    edges = None if distribution is None else [x.unflatten(2, (4, -1)) for x in distribution]
    return HeadOutputs(classification, regression or [], [a.float() for a in anchors], boxes or [], edges)


def head_bytes(case: Case, width: int) -> int:
    """Of one network's numbers (N, H W, width)."""
    return case.batch * case.pixels * width * DTYPES[case.dtype].itemsize


def cross_entropy(s: Tensor, t: Tensor) -> Tensor:
    """BCE(s, sigma(t)), element by element."""
    return torch.nn.functional.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none")
