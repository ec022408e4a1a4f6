"""Losses and teachers that only the GKD ablation asks about; none of them is part of the library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from kdkernels import GKDLoss, Teacher, functional
from kdkernels.losses import DistillationLoss
from kdkernels.reference.map_distance import normalize_map
from kdkernels.teacher import TeacherOutput


class PlainMSE(DistillationLoss):
    """weight / (N C H W) * sum (F_S - F_T)^2 a level: imitation that knows neither boxes nor gradients."""

    compares_features = True

    def teacher_side(self, teacher_features: Any, *_: Any, **__: Any) -> list[Tensor]:
        return [t.detach() for t in teacher_features]

    def terms(self, student_features: Any, side: list[Tensor], student_gradients: Any = None) -> dict[str, Tensor]:
        sums = functional.feature_imitation(student_features, side, None, None)
        elements = torch.tensor([t.numel() for t in side])[:, None]
        return {"imitation": self.weight * sums / elements}


class LevelWeightedGKD(GKDLoss):
    """GKD's map with a factor of its own on each level."""

    def __init__(self, factors: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        self.factors = factors

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        factors = torch.tensor(self.factors)[:, None]
        return {name: term * factors for name, term in super().terms(*args, **kwargs).items()}


class FixedExtremaGKD(GKDLoss):
    """GKD's map whose minimum and maximum are constants: no pixel collects the sum of all signs."""

    def terms(self, student_features: Any, side: Any, student_gradients: Any = None) -> dict[str, Tensor]:
        with torch.no_grad():
            weights = functional.channel_mean(student_gradients, mode="signed")
        maps, low, high = functional.weighted_channel_sum(list(student_features), weights, activation="raw", rectify="abs")
        rows = []
        for r, least, most, r_t in zip(maps, low, high, side.maps, strict=True):
            least, spread = least.detach()[:, None, None], (most - least).detach()[:, None, None]
            m_s = torch.where(spread == 0, 0.0, (r - least) / torch.where(spread == 0, 1.0, spread * (1 + self.eps)))
            n, h, w = r.shape
            rows.append((m_s - normalize_map(r_t)).abs().sum((1, 2)) / (n * h * w))
        return {"map": self.weight * torch.stack(rows)}


def is_spoiled(image_id: int) -> bool:
    """A fixed 40 % of the images, by hash."""
    return hashlib.sha256(f"spoiled {image_id}".encode()).digest()[0] < 0.4 * 256


class UpsideDownTeacher(Teacher):
    """A good teacher that is wrong on a fixed 40 % of the images, because it sees them upside down."""

    def __call__(self, images: ImageList, targets: list[dict[str, Tensor]], *asked: Any, **named: Any) -> TeacherOutput:
        spoiled = torch.tensor([is_spoiled(int(t["image_id"])) for t in targets])
        tensors = torch.where(spoiled[:, None, None, None], images.tensors.flip(2), images.tensors)
        return super().__call__(ImageList(tensors, images.image_sizes), targets, *asked, **named)
