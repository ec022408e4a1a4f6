"""CamLoss: FGD under activation maps of both networks (cam-gmask) or of the teacher; and GKD's maps in the boxes (cam-only)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kdkernels import CamLoss, GKDLoss, functional

from . import fgd, gkd, published, vectorised
from .case import Case
from .entry import Entry, Inputs, boxes
from .features import Parts, total, trained
from .settle import settle_student

ALPHA, BETA, GAMMA, LAMBDA, ONLY = fgd.ALPHA, 0.05, fgd.GAMMA, fgd.LAMBDA, 0.1
EPS = 1e-7


def cam_only_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = {**gkd.pyramids(case, generator, device), "boxes": boxes(case, generator, device), "image_size": case.image_size}
    settle_maps(made)
    return made


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = cam_only_inputs(case, generator, device)
    made["trained"] = trained(CamLoss(), made["student_features"], made["teacher_features"], generator)
    settle(made)
    return made


def teacher_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = inputs(case, generator, device)
    del made["student_gradients"]
    return made


def settle(made: Inputs) -> None:
    settle_student(made, maps=True, attentions=True, released=True)


def settle_maps(made: Inputs) -> None:
    settle_student(made, maps=True, attentions=False, released=True)


def cam(x: Tensor, gradient: Tensor) -> Tensor:
    """(N, H, W): the released code's map, of absolute features and gradients."""
    y = vectorised.channel_sum(x.abs(), vectorised.channel_weights(gradient.abs()))
    y = y - y.amin((1, 2), keepdim=True)
    return y / (y.amax((1, 2), keepdim=True) + EPS)


def box_masks(features: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]) -> list[Tensor]:
    return vectorised.box_masks(boxes, image_size, [(x.shape[2], x.shape[3]) for x in features])


def only_eager(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    student_gradients: list[Tensor],
    teacher_gradients: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
) -> Tensor:
    masks = box_masks(student_features, boxes, image_size)
    levels = zip(student_features, teacher_features, student_gradients, teacher_gradients, masks, strict=True)
    return ONLY * total([((cam(s, a) - cam(t, b)).abs() * m.sqrt()).sum() for s, t, a, b, m in levels]) / student_features[0].shape[0]


def both_eager(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    student_gradients: list[Tensor],
    teacher_gradients: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    trained: Parts,
) -> Tensor:
    masks, rows = box_masks(student_features, boxes, image_size), []
    levels = zip(student_features, teacher_features, student_gradients, teacher_gradients, masks, strict=True)
    for level, (student, teacher, a, b, mask) in enumerate(levels):
        s, t = student.float(), teacher.float()
        own, other = cam(s, a), cam(t, b)
        spatial, channel = vectorised.attention(t)
        roots = (x.detach().sqrt()[:, None] for x in (own, other))
        imitated = vectorised.imitation(s * next(roots), t * next(roots), mask * spatial, channel).sum()
        distance = ((own - other).abs() * mask.sqrt()).sum()
        rows.append(ALPHA * imitated + BETA * distance + GAMMA * fgd.attention_distance(s, spatial, channel))
        rows.append(LAMBDA * fgd.relation(trained, level, s, t))
    return total(rows) / student_features[0].shape[0]


def teacher_eager(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    teacher_gradients: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    trained: Parts,
) -> Tensor:
    masks, rows = box_masks(student_features, boxes, image_size), []
    for level, (student, teacher, b, mask) in enumerate(zip(student_features, teacher_features, teacher_gradients, masks, strict=True)):
        s, t = student.float(), teacher.float()
        spatial, channel = vectorised.attention(t)
        imitated = vectorised.imitation(s, t, mask * spatial * cam(t, b), channel).sum()
        rows.append(ALPHA * imitated + GAMMA * fgd.attention_distance(s, spatial, channel) + LAMBDA * fgd.relation(trained, level, s, t))
    return total(rows) / student_features[0].shape[0]


def cams(features: Tensor, gradients: Tensor) -> Tensor:
    """As the released code, grad-cam's maps image by image."""
    found = []
    for feature, gradient in zip(features, gradients, strict=True):
        weights = gradient.float().abs().mean((1, 2))
        grey = torch.relu((weights[:, None, None] * feature.float().abs()).sum(0))
        grey = grey - grey.min()
        found.append(grey / (EPS + grey.max()))
    return torch.stack(found)


def only_paper(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    student_gradients: list[Tensor],
    teacher_gradients: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
) -> Tensor:
    """As the released code: both maps times the root of the mask."""
    masks = published.box_masks(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
    rows = []
    for s, t, a, b, mask in zip(student_features, teacher_features, student_gradients, teacher_gradients, masks, strict=True):
        root = torch.sqrt(mask)
        rows.append(ONLY * (cams(s, a) * root - cams(t, b) * root).abs().sum() / len(s))
    return total(rows)


def paper(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    teacher_gradients: list[Tensor],
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    trained: Parts,
    student_gradients: list[Tensor] | None = None,
) -> Tensor:
    """As the released code: features times the roots of their map and of all weights. The teacher's variant has no student_gradients."""
    masks = published.box_masks(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
    rows = []
    for level, (student, teacher, b, mask) in enumerate(zip(student_features, teacher_features, teacher_gradients, masks, strict=True)):
        s, t = student.float().contiguous(), teacher.float().contiguous()
        other = cams(t, b)
        own = other if student_gradients is None else cams(s, student_gradients[level])
        spatial, channel = published.attention(t)
        maps = (torch.sqrt(x.detach())[:, None] for x in (own, other))
        weights = [mask[:, None], spatial[:, None], channel[:, :, None, None]]
        loss = ALPHA * published.weighted_error(s * next(maps), t * next(maps), weights) + GAMMA * fgd.attention_loss(s, spatial, channel)
        if student_gradients is not None:
            loss = loss + BETA * (own * torch.sqrt(mask) - other * torch.sqrt(mask)).abs().sum()
        rows.append((loss + LAMBDA * fgd.relation_by_copies(trained, level, s, t)) / len(s))
    return total(rows)


ENTRIES = (
    Entry(
        name="cam_gmask",
        kind="method",
        inputs=inputs,
        call=functional.cam,
        eager=both_eager,
        paper=paper,
        # forward: both gradients (2), both features for maps and attention (2). The product of both maps' roots is no sum of these, so the
        # error needs finished maps: both features again (2). backward: gradients (2), features (2), features and the gradient (3).
        # backward_scaled: the gradient read and written again (2), or the forward's 6 and then features and the gradient (3): 9 both.
        units={"forward": 6, "backward": 7, "backward_scaled": 9},
        differentiable="student_features",
        losses=lambda: {"cam_gmask": CamLoss()},
        settle=settle,
    ),
    Entry(
        name="teacher_cam",
        kind="method",
        inputs=teacher_inputs,
        call=partial(functional.cam, variant="teacher", beta=0.0),
        eager=teacher_eager,
        paper=paper,
        # G_T (1), then FGD's. The map is min-max normalised, so that its weighted sum follows from those with and without the raw map.
        units={mode: units + 1 for mode, units in fgd.UNITS.items()},
        differentiable="student_features",
        losses=lambda: {"teacher_cam": CamLoss(variant="teacher", beta=0.0)},
        settle=fgd.settle,
    ),
    Entry(
        name="cam_only",
        kind="method",
        inputs=cam_only_inputs,
        call=GKDLoss(preset="release", box_weight="sqrt_mask", average="n", weight=ONLY),
        eager=only_eager,
        paper=only_paper,
        # forward as GKD: both gradients and both features (4). backward: the signs of the student's features besides (1), and written (1).
        # The released code's eps is no part of an inline loss, which knows the student's gradients but for a factor.
        units={"forward": 4, "backward": 6, "backward_scaled": 6},
        differentiable="student_features",
        losses=lambda: {"cam_only": GKDLoss(preset="release", box_weight="sqrt_mask", average="n", weight=ONLY)},
        settle=settle_maps,
    ),
)
