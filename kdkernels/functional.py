"""The library without modules: one function a primitive, one a method.

Stateless: `on_nonfinite="flag"` has nowhere to keep a flag and does nothing; "raise" works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .losses import (
    ACAMLoss,
    AIDLoss,
    BMFILoss,
    CamLoss,
    CrossKDLoss,
    CWDLoss,
    DeFeatLoss,
    DistillationLoss,
    FBKDLoss,
    FGDLoss,
    FGFILoss,
    FitNetsLoss,
    FRSLoss,
    FusedLoss,
    GIDLoss,
    GKDLoss,
    GmaskLoss,
    LDLoss,
    MGDLoss,
    PADLoss,
    PKDLoss,
    defeat_head,
    teacher_shares,
)
from .losses.base import TeacherLosses
from .ops import (
    attention,
    box_mask,
    channel_kl,
    channel_mean,
    correlation,
    feature_imitation,
    logit_bce,
    logit_kl,
    map_distance,
    normalize_map,
    random_mask,
    shared_read,
    spatial_pool,
    terms,
    terms_vjp,
    weighted_channel_sum,
)
from .outputs import HeadOutputs
from .pyramid import Gradients, Pyramid

__all__ = [
    "acam",
    "aid",
    "attention",
    "bmfi",
    "box_mask",
    "cam",
    "channel_kl",
    "channel_mean",
    "correlation",
    "crosskd",
    "cwd",
    "defeat",
    "defeat_head",
    "fbkd",
    "feature_imitation",
    "fgd",
    "fgfi",
    "fitnets",
    "frs",
    "fused",
    "gid",
    "gkd",
    "gmask",
    "ld",
    "logit_bce",
    "logit_kl",
    "map_distance",
    "mgd",
    "normalize_map",
    "pad",
    "pkd",
    "random_mask",
    "shared_read",
    "spatial_pool",
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


def acam(student_features: Pyramid, teacher_features: Pyramid, trained: nn.Module | None = None, **options: Any) -> Tensor:
    """Attention masking (arXiv 2503.06307), reconstructed; `options` are those of ACAMLoss, `trained` a built one's `trainable`."""
    return _with(trained, ACAMLoss(**options))(student_features, teacher_features)


def cwd(student_features: Pyramid, teacher_features: Pyramid, **options: Any) -> Tensor:
    """Channel-wise distillation (arXiv 2011.13256); `options` are those of CWDLoss."""
    return CWDLoss(**options)(student_features, teacher_features)


def fbkd(student_features: Pyramid, teacher_features: Pyramid, trained: nn.Module | None = None, **options: Any) -> Tensor:
    """Attention-guided and non-local distillation (ICLR 2021); `options` are those of FBKDLoss, `trained` a built one's `trainable`."""
    return _with(trained, FBKDLoss(**options))(student_features, teacher_features)


def fitnets(student_features: Pyramid, teacher_features: Pyramid, **options: Any) -> Tensor:
    """Plain feature imitation (arXiv 1412.6550); `options` are those of FitNetsLoss."""
    return FitNetsLoss(**options)(student_features, teacher_features)


def mgd(student_features: Pyramid, teacher_features: Pyramid, trained: nn.Module | None = None, **options: Any) -> Tensor:
    """Masked generative distillation (arXiv 2205.01529); `options` are those of MGDLoss, `trained` a built one's `trainable`."""
    return _with(trained, MGDLoss(**options))(student_features, teacher_features)


def pkd(student_features: Pyramid, teacher_features: Pyramid, **options: Any) -> Tensor:
    """Pearson correlation of the features (arXiv 2207.02039); `options` are those of PKDLoss."""
    return PKDLoss(**options)(student_features, teacher_features)


def fgfi(
    student_features: Pyramid,
    teacher_features: Pyramid,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    anchors: Pyramid | None = None,
    trained: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """Fine-grained feature imitation (arXiv 1906.03609); `options` are those of FGFILoss, `trained` a built one's `trainable`."""
    return _with(trained, FGFILoss(**options))(student_features, teacher_features, boxes, image_size, anchors)


def defeat(
    student_features: Pyramid,
    teacher_features: Pyramid,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    trained: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """Objects and background apart (arXiv 2103.14475); `options` are those of DeFeatLoss, `trained` a built one's `trainable`."""
    return _with(trained, DeFeatLoss(**options))(student_features, teacher_features, boxes, image_size)


def fgd(
    student_features: Pyramid,
    teacher_features: Pyramid,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    trained: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """Focal and global distillation (arXiv 2111.11837); `options` are those of FGDLoss, `trained` a built one's `trainable`."""
    return _with(trained, FGDLoss(**options))(student_features, teacher_features, boxes, image_size)


def gmask(
    student_features: Pyramid,
    teacher_features: Pyramid,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    trained: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """FGD under gaussian or exponential masks; `options` are those of GmaskLoss, `trained` a built one's `trainable`."""
    return _with(trained, GmaskLoss(**options))(student_features, teacher_features, boxes, image_size)


def cam(
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_gradients: Gradients | None = None,
    teacher_gradients: Gradients | None = None,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    trained: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """FGD under class activation maps; `options` are those of CamLoss, `trained` a built one's `trainable`."""
    loss = _with(trained, CamLoss(**options))
    return loss(student_features, teacher_features, student_gradients, teacher_gradients, boxes, image_size)


def crosskd(
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_outputs: HeadOutputs,
    teacher_outputs: HeadOutputs,
    boxes: Any,
    image_size: tuple[int, int],
    **options: Any,
) -> Tensor:
    """Cross-head distillation (arXiv 2306.11369), `student_outputs` crossed; `options` are those of CrossKDLoss."""
    return CrossKDLoss(**options)(student_features, teacher_features, student_outputs, teacher_outputs, boxes, image_size)


def frs(
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_outputs: HeadOutputs,
    teacher_outputs: HeadOutputs,
    trained: nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """Feature richness score distillation (arXiv 2106.08022); `options` are those of FRSLoss, `trained` a built one's `trainable`."""
    return _with(trained, FRSLoss(**options))(student_features, teacher_features, student_outputs, teacher_outputs)


def gid(
    student_features: Pyramid, teacher_features: Pyramid, student_outputs: HeadOutputs, teacher_outputs: HeadOutputs, **options: Any
) -> Tensor:
    """General instance distillation (arXiv 2103.02340); `options` are those of GIDLoss."""
    return GIDLoss(**options)(student_features, teacher_features, student_outputs, teacher_outputs)


def ld(
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_outputs: HeadOutputs,
    teacher_outputs: HeadOutputs,
    boxes: Any,
    image_size: tuple[int, int],
    **options: Any,
) -> Tensor:
    """Localization distillation (arXiv 2102.12252); `options` are those of LDLoss."""
    return LDLoss(**options)(student_features, teacher_features, student_outputs, teacher_outputs, boxes, image_size)


def aid(
    base: DistillationLoss, *args: Any, teacher_losses: TeacherLosses, alpha: float = 0.1, granularity: str | None = None, **kwargs: Any
) -> Tensor:
    """Adaptive instance distillation (arXiv 2201.11097): `base`'s arguments, weighted by exp(-alpha * teacher_losses) as AIDLoss does."""
    return AIDLoss(base, alpha, granularity)(*args, teacher_losses=teacher_losses, **kwargs)


def pad(base: DistillationLoss, *args: Any, preset: str = "one-stage", eps: float | None = None, **kwargs: Any) -> Tensor:
    """Adaptive distillation by the variance of the student's features (arXiv 2008.01458): `base`'s arguments, weighted as PADLoss does."""
    return PADLoss(base, preset, eps)(*args, **kwargs)


def fused(
    losses: Mapping[str, DistillationLoss],
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_gradients: Gradients | None = None,
    teacher_gradients: Gradients | None = None,
    boxes: Any = None,
    image_size: tuple[int, int] | None = None,
    teacher_losses: TeacherLosses | None = None,
    **head: Any,
) -> dict[str, Tensor]:
    """Several losses on the same features, as FusedLoss; head: what it takes besides, student_outputs, teacher_outputs and anchors."""
    given = (student_gradients, teacher_gradients, boxes, image_size, teacher_losses)
    return FusedLoss(losses)(student_features, teacher_features, *given, **head)


def _with(trained: nn.Module | None, loss: DistillationLoss) -> DistillationLoss:
    """The loss with the parts of another one's `trainable`; without, the call makes its own from the loss's seed."""
    loss.trainable = trained
    return loss
