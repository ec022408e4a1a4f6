"""`correlation`: read s and t, write the gradient to s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import functional
from kdkernels.pyramid import split_over_images

from .case import Case
from .entry import Entry, Inputs, pyramid

EPS = 1e-6


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"s": pyramid(case, generator, device), "t": pyramid(case, generator, device)}


def eager(s: list[Tensor], t: list[Tensor]) -> Tensor:
    """(L, N)"""
    totals, errors = [], []
    for a, b in zip(s, t, strict=True):
        difference = _standardised(a) - _standardised(b)
        errors.append((difference * difference).sum((1, 2, 3)))
        totals.append(errors[-1].sum() / (2 * a.numel()))
    return split_over_images(torch.stack(totals), torch.stack(errors))


def _standardised(x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x.float(), (0, 2, 3), keepdim=True)
    return (x - mean) / (deviation + EPS)


def paper(s: list[Tensor], t: list[Tensor]) -> Tensor:
    """PKD's code: channels brought forward and flattened, a mean squared error; here besides what each image has of it."""
    totals, errors = [], []
    for a, b in zip(s, t, strict=True):
        x, y = _normalised(a.float()), _normalised(b.float())
        totals.append(F.mse_loss(x, y) / 2)
        errors.append((x.detach() - y).square().sum((1, 2, 3)))
    return split_over_images(torch.stack(totals), torch.stack(errors))


def _normalised(feature: Tensor) -> Tensor:
    n, c, h, w = feature.shape
    feature = feature.permute(1, 0, 2, 3).reshape(c, -1)
    mean, std = feature.mean(dim=-1, keepdim=True), feature.std(dim=-1, keepdim=True)
    return ((feature - mean) / (std + EPS)).reshape(c, n, h, w).permute(1, 0, 2, 3)


ENTRIES = (
    Entry(
        name="correlation",
        kind="primitive",
        inputs=inputs,
        call=functional.correlation,
        eager=eager,
        paper=paper,
        # The gradient needs the statistics of the whole batch: s and t again (2), written (1), with d inside.
        units={"forward": 2, "backward": 5, "backward_scaled": 5},
        differentiable="s",
    ),
)
