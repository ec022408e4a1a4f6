"""GKDLoss: the maps (preset paper), and the imitation weighted by the teacher's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import GKDLoss

from . import published, vectorised
from .case import Case
from .entry import Entry, Inputs, pyramid
from .settle import settle_student

GKD = GKDLoss()
IMITATION = GKDLoss(form="imitation")
#: Of the random gradients. At upstream gradient 65536 distillation then is a fair share of what arrives inline.
GRADIENT_SCALE = 2.0**-6


def pyramids(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Features and gradients of both, not settled."""
    return {
        "student_features": pyramid(case, generator, device),
        "teacher_features": pyramid(case, generator, device),
        "student_gradients": pyramid(case, generator, device, GRADIENT_SCALE),
        "teacher_gradients": pyramid(case, generator, device, GRADIENT_SCALE),
    }


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = pyramids(case, generator, device)
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_student(made, maps=True, attentions=False)


def imitation_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {
        "student_features": pyramid(case, generator, device),
        "teacher_features": pyramid(case, generator, device),
        "teacher_gradients": pyramid(case, generator, device, GRADIENT_SCALE),
    }


def imitation(student_features: list[Tensor], teacher_features: list[Tensor], teacher_gradients: list[Tensor]) -> Tensor:
    return IMITATION(student_features, teacher_features, None, teacher_gradients)


def imitation_eager(student_features: list[Tensor], teacher_features: list[Tensor], teacher_gradients: list[Tensor]) -> Tensor:
    loss = torch.zeros((), device=student_features[0].device)
    for s, t, g in zip(student_features, teacher_features, teacher_gradients, strict=True):
        w = vectorised.channel_weights(g)
        spatial = vectorised.minmax(vectorised.channel_sum(t, w).abs())
        channel = s.shape[1] * w.abs() / w.abs().sum(1, keepdim=True)
        loss = loss + vectorised.imitation(s, t, spatial, channel).sum() / s.numel()
    return loss


def imitation_paper(student_features: list[Tensor], teacher_features: list[Tensor], teacher_gradients: list[Tensor]) -> Tensor:
    """No published code has this form: image by image, its error written as FGD's."""
    loss = torch.zeros((), device=student_features[0].device)
    for s, t, g in zip(student_features, teacher_features, teacher_gradients, strict=True):
        for a, b, gradient in zip(s, t, g, strict=True):
            w = gradient.float().mean((1, 2)).abs()
            channel = len(w) * w / w.sum()
            loss = loss + published.weighted_error(a, b, [published.cam(b, gradient), channel[:, None, None]]) / s.numel()
    return loss


ENTRIES = (
    Entry(
        name="gkd",
        kind="method",
        inputs=inputs,
        call=GKD,
        eager=vectorised.gkd,
        paper=published.gkd,
        # Both gradients for the weights (2), both features for the maps (2). The gradient w_c * sign * dr needs no feature again: it is
        # written (1) with d inside. Inline it is added to G_S: read again and written (2).
        units={"forward": 4, "backward": 5, "backward_scaled": 5, "inline": 6},
        differentiable="student_features",
        losses=lambda: {"gkd": GKDLoss()},
        settle=settle,
    ),
    Entry(
        name="gkd_imitation",
        kind="method",
        inputs=imitation_inputs,
        call=imitation,
        eager=imitation_eager,
        paper=imitation_paper,
        # forward: G_T for the weights (1), then S and T (2): the map is min-max normalised, so its weighted sum of errors follows from the
        # sums with and without the raw map, both of this pass. backward: G_T (1), T for the map (1), S, T and the gradient (3).
        # backward_scaled: the forward's 3, then S, T and the gradient with d inside (3). inline: d is known, G_S is read and written
        # where the gradient was written: one more than backward.
        units={"forward": 3, "backward": 5, "backward_scaled": 6, "inline": 6},
        differentiable="student_features",
        losses=lambda: {"gkd_imitation": GKDLoss(form="imitation")},
    ),
)
