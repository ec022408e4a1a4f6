"""AIDLoss around BMFILoss, one weight an image."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import AIDLoss, BMFILoss

from . import bmfi, published, vectorised
from .case import Case
from .entry import Entry, Inputs

AID_BMFI = AIDLoss(BMFILoss())
AID_ALPHA = 0.1


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    # A teacher's detection losses are about 0 to 4.
    return {**bmfi.inputs(case, generator, device), "teacher_losses": (4 * torch.rand(1, case.batch, generator=generator)).to(device)}


def eager(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    teacher_losses: Tensor,
) -> Tensor:
    images = vectorised.bmfi_images(student_features, teacher_features, boxes, image_size)
    return ((-AID_ALPHA * teacher_losses[0]).exp() * images).sum()


def paper(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    teacher_losses: Tensor,
) -> Tensor:
    """Image by image, the base loss once for each: the per-image loop of the AID repository."""
    padded, counts = boxes
    batch, loss = len(padded), torch.zeros((), device=padded.device)
    for n in range(batch):
        one = slice(n, n + 1)
        s, t = ([x[one] for x in levels] for levels in (student_features, teacher_features))
        base = published.bmfi(s, t, (padded[one], counts[one]), image_size)
        loss = loss + torch.exp(-AID_ALPHA * teacher_losses[0, n]) * base / batch
    return loss


ENTRIES = (
    Entry(
        name="aid_bmfi",
        kind="method",
        inputs=inputs,
        call=AID_BMFI,
        eager=eager,
        paper=paper,
        # The weights are known beforehand and multiply sums and gradients that are there anyway.
        units=bmfi.UNITS,
        differentiable="student_features",
        losses=lambda: {"aid_bmfi": AIDLoss(BMFILoss())},
        settle=bmfi.settle,
    ),
)
