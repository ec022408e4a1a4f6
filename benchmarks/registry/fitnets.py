"""FitNetsLoss: the mean squared difference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdkernels import FitNetsLoss

from .entry import Entry
from .features import features, total


def eager(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    return total([(s.float() - t.float()).square().mean() for s, t in zip(student_features, teacher_features, strict=True)])


def paper(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    """Image by image."""
    pairs = zip(student_features, teacher_features, strict=True)
    return total([total([F.mse_loss(a.float(), b.float()) for a, b in zip(s, t, strict=True)]) / len(s) for s, t in pairs])


ENTRIES = (
    Entry(
        name="fitnets",
        kind="method",
        inputs=features,
        call=FitNetsLoss(),
        eager=eager,
        paper=paper,
        # As `feature_imitation`: S and T once, the gradient written; inline G_S is read besides, d is known before.
        units={"forward": 2, "backward": 3, "backward_scaled": 5, "inline": 4},
        differentiable="student_features",
        losses=lambda: {"fitnets": FitNetsLoss()},
    ),
)
