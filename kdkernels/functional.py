"""The library without modules: one function a primitive, one a method.

Stateless: `on_nonfinite="flag"` has nowhere to keep a flag and does nothing; "raise" works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .losses import AIDLoss, BMFILoss, DistillationLoss, FusedLoss, GKDLoss, teacher_shares
from .ops import (
    attention,
    box_mask,
    channel_mean,
    feature_imitation,
    map_distance,
    normalize_map,
    shared_read,
    terms,
    terms_vjp,
    weighted_channel_sum,
)
from .pyramid import Gradients, Pyramid

__all__ = [
    "aid",
    "attention",
    "bmfi",
    "box_mask",
    "channel_mean",
    "feature_imitation",
    "fused",
    "gkd",
    "map_distance",
    "normalize_map",
    "shared_read",
    "teacher_shares",
    "terms",
    "terms_vjp",
    "weighted_channel_sum",
]


def gkd(
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_gradients: Gradients | None = None,
    teacher_gradients: Gradients | None = None,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    **options: Any,
) -> Tensor:
    """Gradient-guided distillation (arXiv 2303.04240); `options` are those of GKDLoss."""
    return GKDLoss(**options)(student_features, teacher_features, student_gradients, teacher_gradients, boxes, image_size)


def bmfi(
    student_features: Pyramid, teacher_features: Pyramid, boxes: Any = None, image_size: tuple[int, int] | None = None, **options: Any
) -> Tensor:
    """Box-aware multi-grained feature imitation (arXiv 2303.04240); `options` are those of BMFILoss."""
    return BMFILoss(**options)(student_features, teacher_features, boxes, image_size)


def aid(
    base: DistillationLoss, *args: Any, teacher_losses: Tensor | float, alpha: float = 0.1, granularity: str | None = None, **kwargs: Any
) -> Tensor:
    """Adaptive instance distillation (arXiv 2201.11097): `base`'s arguments, weighted by exp(-alpha * teacher_losses) as AIDLoss does."""
    return AIDLoss(base, alpha, granularity)(*args, teacher_losses=teacher_losses, **kwargs)


def fused(
    losses: Mapping[str, DistillationLoss],
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_gradients: Gradients | None = None,
    teacher_gradients: Gradients | None = None,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    teacher_losses: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """Several losses on the same features, as FusedLoss."""
    return FusedLoss(losses)(
        student_features, teacher_features, student_gradients, teacher_gradients, boxes, image_size, teacher_losses
    )
