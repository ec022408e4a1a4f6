"""PADLoss around FitNetsLoss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import FitNetsLoss, PADLoss

from .entry import Entry
from .features import features, total

EPS = 1e-6


def eager(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    rows = []
    for s, t in zip(student_features, teacher_features, strict=True):
        wide = s.float()
        variance = wide.var(correction=0)
        rows.append((wide - t.float()).square().mean() / (EPS + variance) + variance.log())
    return total(rows)


def paper(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    """As beside AID's code: the logarithm of the variance first, its exponential where it divides."""
    rows = []
    for s, t in zip(student_features, teacher_features, strict=True):
        log_variance = torch.log(torch.var(s.float(), unbiased=False))
        rows.append(F.mse_loss(s.float(), t.float()) / (EPS + torch.exp(log_variance)) + log_variance)
    return total(rows)


ENTRIES = (
    Entry(
        name="pad",
        kind="method",
        inputs=features,
        call=PADLoss(FitNetsLoss()),
        eager=eager,
        paper=paper,
        # The variance's gradient needs the sum of the errors, and both need the mean: S and T again (2), written (1).
        units={"forward": 2, "backward": 5, "backward_scaled": 5},
        differentiable="student_features",
        losses=lambda: {"pad": PADLoss(FitNetsLoss())},
    ),
)
