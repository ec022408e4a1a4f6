"""Losses of the papers' methods for tests of what all of them have in common, and all arguments that they may take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from levels import pyramid
from torch import Tensor

from kdkernels import CamLoss, DeFeatLoss, DistillationLoss, FGDLoss, FGFILoss, FitNetsLoss, GKDLoss, GmaskLoss

IMAGE_SIZE = (256, 384)
SHAPES = [(3, 4, 6, 9), (3, 5, 3, 5), (3, 2, 2, 2), (3, 3, 1, 1)]
#: Of the first image two that overlap, of the last one that leaves the image.
BOXES = [[[8.0, 10.0, 150.0, 130.0], [130.0, 20.0, 260.0, 250.0]], [[33.3, 5.1, 71.7, 60.2]], [[200.0, -12.0, 430.0, 125.0]]]
FOCAL = {"alpha": 0.4, "beta": 0.3, "gamma": 0.2, "lambda_": 0.1}
#: Losses that take the features alone or with boxes and anchors: class and options, with coefficients that let every term be seen.
LOSSES: dict[str, tuple[type[DistillationLoss], dict[str, Any]]] = {
    "fitnets": (FitNetsLoss, {}),
    "fgfi": (FGFILoss, {"weight": 1.0}),
    "fgfi ld": (FGFILoss, {"preset": "ld-kitti"}),
    "defeat": (DeFeatLoss, {}),
    "defeat ld": (DeFeatLoss, {"preset": "ld-kitti"}),
    "fgd": (FGDLoss, FOCAL),
    "fgd alone": (FGDLoss, {**FOCAL, "lambda_": 0.0}),
    "gmask": (GmaskLoss, FOCAL),
    "emask": (GmaskLoss, {"mask": "exponential", "lambda_": 0.0}),
    "cam-gmask": (CamLoss, FOCAL),
    "cam-gmask alone": (CamLoss, {**FOCAL, "lambda_": 0.0, "eps_mode": "relative"}),
    "teacher-cam": (CamLoss, {**FOCAL, "beta": 0.0, "variant": "teacher"}),
    "cam-only": (GKDLoss, {"preset": "release", "box_weight": "sqrt_mask", "average": "n", "weight": 0.1}),
}
#: Of those, the ones with parts to train.
TRAINED = ("fgfi", "defeat", "fgd", "gmask", "cam-gmask", "teacher-cam")
#: Those that pass every student through a convolution.
ADAPTED = ("fgfi", "defeat")
#: Those that take a student of other sizes than the teacher's.
ANY_SIZE = (*ADAPTED, "cam-only")
#: Those that see boxes.
BOXED = tuple(name for name in LOSSES if name != "fitnets")


def anchors(shapes: Sequence[Sequence[int]] = SHAPES, per_position: int = 2) -> list[Tensor]:
    """Squares around the centres of the cells, (H W k, 4) a level, one twice as large as the other."""
    levels = []
    for _, _, rows, columns in shapes:
        step = torch.tensor([IMAGE_SIZE[1] / columns, IMAGE_SIZE[0] / rows])
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = (torch.stack([x, y], -1) + 0.5) * step
        half = torch.stack([step * 2**k for k in range(per_position)])
        corners = torch.cat([centre[:, :, None] - half, centre[:, :, None] + half], -1)
        levels.append(corners.reshape(-1, 4))
    return levels


def given(
    seed: int = 0, shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64, boxes: Any = None, **layout: Any
) -> dict[str, Any]:
    """All arguments that a loss may take, by name; the student's features are leaves."""
    names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients")
    found: dict[str, Any] = {name: pyramid(shapes, dtype, seed=4 * seed + k, **layout) for k, name in enumerate(names)}
    found["student_features"] = [x.requires_grad_() for x in found["student_features"]]
    images = shapes[0][0] if len(shapes) else 0
    found["boxes"] = [torch.tensor(b).reshape(-1, 4) for b in (BOXES[:images] if boxes is None else boxes)]
    return {**found, "image_size": IMAGE_SIZE, "anchors": anchors(shapes)}


def new(name: str, **options: Any) -> DistillationLoss:
    """A loss as it comes from its class."""
    kind, own = LOSSES[name]
    return kind(**own, **options)


def call(loss: DistillationLoss, case: dict[str, Any], **more: Any) -> Tensor:
    """The loss of those arguments that it takes."""
    return loss(**{name: case[name] for name in loss.argument_names}, **more)


def made(name: str, case: dict[str, Any], dtype: torch.dtype = torch.float64, **options: Any) -> DistillationLoss:
    """A loss whose trained parts, if it has any, are built for the case and have no parameter that is 0."""
    loss = new(name, **options)
    if name in TRAINED:
        loss.build(case["student_features"], case["teacher_features"])
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return loss.to(dtype)


def widened(loss: DistillationLoss, case: dict[str, Any]) -> tuple[DistillationLoss, dict[str, Any]]:
    """The same in float64: copies of the loss and of the case, whose features are leaves."""
    wide = {
        name: [a.detach().double().contiguous() for a in x] if name.endswith(("features", "gradients")) else x for name, x in case.items()
    }
    wide["student_features"] = [x.requires_grad_() for x in wide["student_features"]]
    return copy.deepcopy(loss).double(), wide


def gradients(value: Tensor, case: dict[str, Any], retain: bool = False) -> list[Tensor]:
    """Of the sum of the value, at the student's features; 0 where there is none."""
    found = torch.autograd.grad(value.sum(), case["student_features"], allow_unused=True, retain_graph=retain)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, case["student_features"], strict=True)]
