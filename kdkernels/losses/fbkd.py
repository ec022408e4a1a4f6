"""FBKD: attention-guided and non-local distillation (Zhang and Ma, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.attention import check_temperature
from ..pyramid import Gradients, Pyramid, accumulate, as_pyramid, split_over_images, stack_levels
from .base import Method, TeacherLosses, preset_options
from .comparison import ComparisonLoss, resized, root
from .composed import student_levels
from .non_local import NonLocal
from .trainable import Align, Trainable, as_parameters, facing

TERMS = ("feature", "channel", "spatial", "nonlocal")
# A level of the pyramid each, the last for all further ones: of the non-local blocks' inner channels, and of their pooling.
REDUCTIONS = (4, 4, 2, 2, 2)
POOLS = (8, 4, 2, 2, 2)


class FBKDSide(NamedTuple):
    """The teacher's part of a FBKDLoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    spatial: list[Tensor]  # attention S (N, H, W)
    channel: list[Tensor]  # attention Ch (N, C)
    maps: list[Tensor]  # (N, H, W), means over the channels
    means: list[Tensor]  # (N, C), means over the positions


class FBKDLoss(ComparisonLoss, Trainable):
    """Attention-guided and non-local distillation (Zhang and Ma, ICLR 2021, openreview.net/forum?id=uKhGRvM8QNH).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; the convolutions are in their parameters' type, the rest and the result are
    fp32 (fp64 for fp64). With S and Ch the attention of `ops.attention` at `temperature`, S' and Ch' the means of both networks', which
    are constants, and m_hw, m_c the means over the positions and over the channels, per level:

    feature  = weight * alpha   * sqrt( sum_{n,c,h,w} S' Ch' (conv1x1(F_S) - F_T)^2 )
    channel  = weight * beta    * sqrt( sum_{n,c}   (Linear(m_hw F_S) - m_hw F_T)^2 )
    spatial  = weight * gamma   * sqrt( sum_{n,h,w} (conv3x3(m_c F_S) - m_c F_T)^2 )
    nonlocal = weight * lambda_ * sqrt( sum_{n,c,h,w} (conv1x1(NL_S(F_S)) - NL_T(F_T))^2 )

    NL are non-local blocks, the teacher's is trained too (`kdkernels.losses.non_local`); their channels are C/4, C/4, C/2, C/2, ... and
    their pooling is 8, 4, 2, 2, ... by level. The roots are of sums, not of means, and have gradient 0 where they are 0.

    Batch-coupled: a level's root is split over the images by their parts of the sum. Channels and sizes of the networks may differ: the
    student is resized first, and its Ch is that of conv1x1(F_S) where its channels are not the teacher's.

    weight:            factor of all coefficients
    preset:            "one-stage" and "two-stage" (temperature, coefficients and channel_attention of lanqz7766/AID, kd_attention.py and
                       kd_two_stage_attention.py), "one-stage-aid" and "two-stage-aid" (what these take under AID, kd_att_sw.py and
                       kd_two_stage_att_sw.py), "mmrazor" (open-mmlab/mmrazor, Faster R-CNN)
    channel_attention: False leaves Ch' out, as mmrazor does
    seed:              of the initial parameters
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "fbkd",
            "attention-guided and non-local distillation",
            "openreview.net/forum?id=uKhGRvM8QNH; lanqz7766/AID, kd_attention.py; open-mmlab/mmrazor",
            "alpha ||S' Ch' (conv(F_S) - F_T)^2||^(1/2) + beta ||Linear(m_hw F_S) - m_hw F_T|| + gamma ||conv(m_c F_S) - m_c F_T||"
            " + lambda ||conv(NL_S(F_S)) - NL_T(F_T)||",
            "batch-coupled",
        ),
    )
    PRESETS = {
        "one-stage": {"alpha": 4.2e-4, "beta": 2.4e-2, "gamma": 2.4e-2, "lambda_": 4.2e-4, "temperature": 0.1, "channel_attention": True},
        "one-stage-aid": {
            "alpha": 5.6e-4,
            "beta": 2.4e-2,
            "gamma": 2.4e-2,
            "lambda_": 4.9e-4,
            "temperature": 0.1,
            "channel_attention": True,
        },
        "two-stage": {"alpha": 4e-5, "beta": 2e-3, "gamma": 2e-3, "lambda_": 2e-5, "temperature": 0.5, "channel_attention": True},
        "two-stage-aid": {"alpha": 4e-5, "beta": 8e-3, "gamma": 8e-3, "lambda_": 4e-5, "temperature": 0.5, "channel_attention": True},
        "mmrazor": {"alpha": 7e-5, "beta": 4e-3, "gamma": 4e-3, "lambda_": 7e-5, "temperature": 0.5, "channel_attention": False},
    }

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        lambda_: float | None = None,
        temperature: float | None = None,
        channel_attention: bool | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        super().__init__(weight, reduction, on_nonfinite)
        given = {"alpha": alpha, "beta": beta, "gamma": gamma, "lambda_": lambda_}
        chosen = preset_options(self.PRESETS, preset, **given, temperature=temperature, channel_attention=channel_attention)
        check_temperature(chosen["temperature"])
        self.alpha, self.beta, self.gamma, self.lambda_ = (float(chosen[name]) for name in given)
        self.preset, self.temperature, self.channel_attention = preset, float(chosen["temperature"]), bool(chosen["channel_attention"])
        self.seed = seed

    def coefficient(self, term: str) -> float:
        return self.weight * dict(zip(TERMS, (self.alpha, self.beta, self.gamma, self.lambda_), strict=True))[term]

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return Adaptation(student, teacher)

    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
    ) -> FBKDSide:
        levels, names = as_pyramid("teacher_features", teacher_features)
        levels = [x.detach() for x in levels]
        with torch.no_grad():
            maps, spatial, channel = ops.shared_read(levels, _equal_weights(levels), "raw", "none", self.temperature)
            return FBKDSide(levels, names, spatial, channel, maps, ops.channel_mean(levels))

    def terms(self, student_features: Pyramid, side: FBKDSide, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        levels, _ = student_levels(student_features, side.names, side.features, "N")
        if not levels:
            return dict.fromkeys(TERMS, torch.zeros(0, 0))
        # Lifted once, so that the gradients of all that reads them are added before they are rounded to 16 bits.
        features = [accumulate(x) for x in levels]
        parts = self.build(features, side.features).trainable
        assert parts is not None
        features = [resized(s, t) for s, t in zip(features, side.features, strict=True)]
        maps, _, _ = ops.weighted_channel_sum(features, _equal_weights(features), "raw", "none")
        adapted: Adapted = parts(features, side.features, ops.channel_mean(features), maps)
        spatial, channel = self._attention(features, adapted.features, side)
        relations = [facing(s, t) for s, t in zip(adapted.student_relations, adapted.teacher_relations, strict=True)]
        numerators = {
            "feature": ops.feature_imitation(adapted.features, side.features, spatial, channel),
            "channel": _squares(adapted.means, side.means),
            "spatial": _squares(adapted.maps, side.maps),
            "nonlocal": ops.feature_imitation(relations, [x.detach() for x in adapted.teacher_relations]),
        }
        return {term: split_over_images(self.coefficient(term) * root(rows.sum(1)), rows) for term, rows in numerators.items()}

    @torch.no_grad()
    def _attention(self, student: Sequence[Tensor], aligned: Sequence[Tensor], side: FBKDSide) -> tuple[list[Tensor], list[Tensor] | None]:
        """S' (N, H, W), and Ch' (N, C) if it takes part."""
        spatial, channel = ops.attention([x.detach() for x in student], self.temperature)
        shared = [(a + b) / 2 for a, b in zip(spatial, side.spatial, strict=True)]
        if not self.channel_attention:
            return shared, None
        other = [level for level, (s, a) in enumerate(zip(student, aligned, strict=True)) if s.shape[1] != a.shape[1]]
        if other:
            _, of_aligned = ops.attention([aligned[level].detach() for level in other], self.temperature)
            replaced = dict(zip(other, of_aligned, strict=True))
            channel = [replaced.get(level, own) for level, own in enumerate(channel)]
        return shared, [(a + b) / 2 for a, b in zip(channel, side.channel, strict=True)]


class Adapted(NamedTuple):
    """What FBKD compares with the teacher, a tensor a level: of the student's features, their means over the positions (N, C) and over the
    channels (N, H, W); and of the non-local blocks of both networks.
    """

    features: list[Tensor]
    means: list[Tensor]
    maps: list[Tensor]
    student_relations: list[Tensor]
    teacher_relations: list[Tensor]


class Adaptation(nn.Module):
    """FBKD's convolutions, linear layers and non-local blocks of every level."""

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        super().__init__()
        pairs = [(s.shape[1], t.shape[1]) for s, t in zip(student, teacher, strict=True)]
        self.feature = Align(student, teacher, always=True)
        self.channel = nn.ModuleList(nn.Linear(c_s, c_t) for c_s, c_t in pairs)
        self.spatial = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in pairs)
        self.student_blocks, self.teacher_blocks = (
            nn.ModuleList(_block(channels, level) for level, channels in enumerate(side)) for side in zip(*pairs, strict=True)
        )
        self.relation = nn.ModuleList(nn.Conv2d(c_s, c_t, 1) for c_s, c_t in pairs)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], means: Sequence[Tensor], maps: Sequence[Tensor]) -> Adapted:
        """student, teacher: (N, C, H, W) of equal sizes; means (N, C) and maps (N, H, W) of the student."""
        return Adapted(
            self.feature(student, teacher),
            [layer(as_parameters(x, self)) for layer, x in zip(self.channel, means, strict=True)],
            [layer(as_parameters(x[:, None], self))[:, 0] for layer, x in zip(self.spatial, maps, strict=True)],
            [layer(block(x)) for layer, block, x in zip(self.relation, self.student_blocks, student, strict=True)],
            [block(x) for block, x in zip(self.teacher_blocks, teacher, strict=True)],
        )


def _block(channels: int, level: int) -> NonLocal:
    reduction, pool = (sizes[min(level, len(sizes) - 1)] for sizes in (REDUCTIONS, POOLS))
    return NonLocal(channels, max(channels // reduction, 1), pool)


def _equal_weights(levels: Sequence[Tensor]) -> list[Tensor]:
    """(N, C) a level, with which `weighted_channel_sum` is the mean over the channels."""
    return [accumulate(x[:0]).new_full(x.shape[:2], 1 / x.shape[1]) for x in levels]


def _squares(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(L, N): sum (a - b)^2 of tensors (N, ...)."""
    return stack_levels([(accumulate(x) - accumulate(y)).square().flatten(1).sum(1) for x, y in zip(a, b, strict=True)])
