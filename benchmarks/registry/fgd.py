"""FGDLoss: imitation of objects and background, attention, and the relation by trained blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import FGDLoss, functional

from . import published, regions, vectorised
from .case import Case
from .entry import Entry, Function, Inputs
from .features import Parts, features_and_boxes, total, trained
from .settle import settle_student

#: Of preset one-stage.
ALPHA, BETA, GAMMA, LAMBDA = 1e-3, 5e-4, 5e-4, 5e-6
#: forward: S and T once (2): what BMFI needs, and beside it the blocks' pooled context, by a softmax that is made while it is read. A block
#: shifts a channel by the same number everywhere, so that the relation follows from sums of this pass too.
#: backward: attention and shifts must be finished before the gradient, so S and T for these (2), then S, T and the gradient (3).
#: backward_scaled: the values come with the first pass, d is known before the second.
UNITS = {"forward": 2, "backward": 5, "backward_scaled": 5}


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = features_and_boxes(case, generator, device)
    made["trained"] = trained(FGDLoss(), made["student_features"], made["teacher_features"], generator)
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_student(made, maps=False, attentions=True)


def added(block: Parts, x: Tensor) -> Tensor:
    """(N, C, 1, 1): what a global context block adds to x."""
    weight = block.logits(x).flatten(2).softmax(2)
    context = torch.bmm(x.flatten(2), weight.transpose(1, 2))
    return block.transform(context[..., None])


def relation(trained: Parts, level: int, s: Tensor, t: Tensor) -> Tensor:
    difference = s - t + (added(trained.student[level], s) - added(trained.teacher[level], t))
    return difference.square().sum()


def attention_distance(s: Tensor, spatial_t: Tensor, channel_t: Tensor) -> Tensor:
    spatial, channel = vectorised.attention(s)
    return (spatial - spatial_t).abs().sum() + (channel - channel_t).abs().sum()


def eager_with(masks: Function, beta: float) -> Function:
    """The loss with these masks of boxes."""

    def eager(
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        boxes: tuple[Tensor, Tensor],
        image_size: tuple[int, int],
        trained: Parts,
    ) -> Tensor:
        foreground = masks(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
        weights = [ALPHA * m for m in foreground]
        if beta:
            weights = [w + beta * b for w, b in zip(weights, regions.background(foreground), strict=True)]
        rows = []
        for level, (student, teacher, weight) in enumerate(zip(student_features, teacher_features, weights, strict=True)):
            s, t = student.float(), teacher.float()
            spatial, channel = vectorised.attention(t)
            imitated = vectorised.imitation(s, t, weight * spatial, channel).sum()
            rows.append(imitated + GAMMA * attention_distance(s, spatial, channel) + LAMBDA * relation(trained, level, s, t))
        return total(rows) / student_features[0].shape[0]

    return eager


def added_by_products(block: Parts, x: Tensor) -> Tensor:
    """As FGD's code: a matrix product with its column of weights."""
    n, c, h, w = x.shape
    weight = F.softmax(block.logits(x).view(n, 1, h * w), dim=2).unsqueeze(-1)
    context = torch.matmul(x.view(n, c, h * w).unsqueeze(1), weight).view(n, c, 1, 1)
    return block.transform(context)


def relation_by_copies(trained: Parts, level: int, s: Tensor, t: Tensor) -> Tensor:
    """As FGD's code: both networks' features with what their block adds to them."""
    out_s = s + added_by_products(trained.student[level], s)
    return F.mse_loss(out_s, t + added_by_products(trained.teacher[level], t), reduction="sum")


def attention_loss(s: Tensor, spatial_t: Tensor, channel_t: Tensor) -> Tensor:
    spatial, channel = published.attention(s)
    return F.l1_loss(channel, channel_t, reduction="sum") + F.l1_loss(spatial, spatial_t, reduction="sum")


def paper_with(masks: Callable[..., list[Tensor]], beta: float) -> Function:
    """As FGD's code: masks box by box, both features multiplied by the roots of all weights, objects and background apart."""

    def paper(
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        boxes: tuple[Tensor, Tensor],
        image_size: tuple[int, int],
        trained: Parts,
    ) -> Tensor:
        foreground = masks(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
        parts = [(ALPHA, foreground)] + ([(beta, regions.background_by_image(foreground))] if beta else [])
        rows = []
        for level, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
            s, t = student.float().contiguous(), teacher.float().contiguous()
            spatial, channel = published.attention(t)
            loss = GAMMA * attention_loss(s, spatial, channel) + LAMBDA * relation_by_copies(trained, level, s, t)
            for factor, weight in parts:
                weights = [weight[level][:, None], spatial[:, None], channel[:, :, None, None]]
                loss = loss + factor * published.weighted_error(s, t, weights)
            rows.append(loss / len(s))
        return total(rows)

    return paper


ENTRIES = (
    Entry(
        name="fgd",
        kind="method",
        inputs=inputs,
        call=functional.fgd,
        eager=eager_with(regions.area, BETA),
        paper=paper_with(regions.area_by_box, BETA),
        units=UNITS,
        differentiable="student_features",
        losses=lambda: {"fgd": FGDLoss()},
        settle=settle,
    ),
)
