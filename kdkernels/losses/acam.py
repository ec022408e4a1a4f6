"""ACAM-KD: adaptive and cooperative attention masking (arXiv 2503.06307), reconstructed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops.terms import ImitationTerm
from ..pyramid import Gradients, Pyramid, accumulate, quotient, stack_levels
from .base import Method, preset_options
from .comparison import ComparisonLoss, TeacherFeatures
from .composed import student_levels
from .trainable import Align, Trainable, as_parameters

TERMS = ("channel", "spatial", "diversity")


class ACAMLoss(ComparisonLoss, Trainable):
    """Adaptive and cooperative attention masking (Lan and Tian, ICCV 2025, arXiv 2503.06307). Reconstructed.

    There is no public code, and the full text was not available: this follows the abstract, the authors' figure and two independent
    reading notes. These disagree on the normalisers of the masked differences; taken is the reading in which each mask's sum divides, so
    that a mask gives a mean and cannot lower the loss by being small. Initial values are torch's defaults.

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; the convolutions are in their parameters' type, the rest and the result are
    fp32 (fp64 for fp64). Per level and image, with M masks of each kind and E = (align(F_S) - F_T)^2:

    Q = Wq F_T, K = Wk F_S, V = Wv F_S          1x1 convolutions, Q and K to C/2 channels, V to C
    Z = softmax(Q^T K / sqrt(C/2)) V            over all positions, by torch.nn.functional.scaled_dot_product_attention
    Mc = sigmoid(m_c mean_hw Z)  (M, C),        Ms = sigmoid(m_s Z)  (M, H W),       m_c (M, 1) and m_s (M, C) trained
    channel   = weight * alpha   / (N M) * sum_m ( sum_{c,h,w} Mc_mc E / (H W sum_c Mc_mc) )
    spatial   = weight * alpha   / (N M) * sum_m ( sum_{c,h,w} Ms_mhw E / (C sum_hw Ms_mhw) )
    diversity = weight * lambda_ / N * (overlap(Mc) + overlap(Ms)),   overlap(M) = sum_{i != j} 2 M_i.M_j / (|M_i|^2 + |M_j|^2)

    align is a 1x1 convolution where channels differ, and an interpolation where sizes do. The masks have a gradient in all terms, and so
    has the student through K and V. Separable: each entry (l, n) depends on its own level and image alone.

    weight: factor of alpha and lambda_
    preset: "one-stage" and "two-stage", both alpha 1, lambda_ 1, 6 masks
    alpha:  of the masked differences;   lambda_: of the masks' overlap;   masks: M
    seed:   of the initial parameters
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "acam",
            "adaptive and cooperative attention masking (reconstructed)",
            "arXiv 2503.06307; reconstructed: no public code",
            "alpha/(N M) * sum_m (mean of E weighted by Mc_m + mean of E weighted by Ms_m) + lambda/N * (overlap(Mc) + overlap(Ms)),"
            "  E = (align(F_S) - F_T)^2,  masks = sigmoid(m softmax(Q_T^T K_S/sqrt(C/2)) V_S)",
            "separable",
        ),
    )
    PRESETS = {
        "one-stage": {"alpha": 1.0, "lambda_": 1.0, "masks": 6},
        "two-stage": {"alpha": 1.0, "lambda_": 1.0, "masks": 6},
    }

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        alpha: float | None = None,
        lambda_: float | None = None,
        masks: int | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        super().__init__(weight, reduction, on_nonfinite)
        chosen = preset_options(self.PRESETS, preset, alpha=alpha, lambda_=lambda_, masks=masks)
        if chosen["masks"] < 1:
            raise ValueError(f"masks must be at least 1; got {masks}")
        self.preset, self.alpha, self.lambda_, self.masks = preset, float(chosen["alpha"]), float(chosen["lambda_"]), int(chosen["masks"])
        self.seed = seed

    def coefficient(self, term: str) -> float:
        return self.weight * (self.lambda_ if term == "diversity" else self.alpha)

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return Masking(student, teacher, self.masks)

    def terms(self, student_features: Pyramid, side: TeacherFeatures, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        levels, _ = student_levels(student_features, side.names, side.features, "N")
        if not levels:
            return dict.fromkeys(TERMS, torch.zeros(0, 0))
        # Lifted once, so that the gradients of all that reads them are added before they are rounded to 16 bits.
        features = [accumulate(x) for x in levels]
        parts = self.build(features, side.features).trainable
        assert parts is not None
        masked: Masked = parts(features, side.features)
        images = max(features[0].shape[0], 1)
        share = self.weight * self.alpha / (images * self.masks)
        channel = [_shares(m) * (share / (x.shape[2] * x.shape[3])) for m, x in zip(masked.channel, side.features, strict=True)]
        spatial = [
            (_shares(m) * (share / x.shape[1])).unflatten(1, x.shape[2:]) for m, x in zip(masked.spatial, side.features, strict=True)
        ]
        overlaps = stack_levels([_overlap(a) + _overlap(b) for a, b in zip(masked.channel, masked.spatial, strict=True)])
        return {
            **_imitation(masked.features, side.features, channel, spatial),
            "diversity": self.coefficient("diversity") / images * overlaps,
        }


class Masked(NamedTuple):
    """A tensor a level: the aligned student (N, C, H, W), and the masks of channels (N, M, C) and of positions (N, M, H W)."""

    features: list[Tensor]
    channel: list[Tensor]
    spatial: list[Tensor]


class Masking(nn.Module):
    """ACAM-KD's alignment and masks of every level."""

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], masks: int) -> None:
        super().__init__()
        self.align = Align(student, teacher)
        self.levels = nn.ModuleList(LevelMasks(s.shape[1], t.shape[1], masks) for s, t in zip(student, teacher, strict=True))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Masked:
        aligned = self.align(student, teacher)
        made = [level(s, t) for level, s, t in zip(self.levels, student, teacher, strict=True)]
        return Masked(aligned, [channel for channel, _ in made], [spatial for _, spatial in made])


class LevelMasks(nn.Module):
    """The masks of one level, from what the teacher's positions find among the student's.

    query, key, value: 1x1 convolutions to C/2, C/2 and C channels, C the teacher's;   channel_units, spatial_units: m_c and m_s
    """

    def __init__(self, student_channels: int, teacher_channels: int, masks: int) -> None:
        super().__init__()
        inner = max(teacher_channels // 2, 1)
        self.query = nn.Conv2d(teacher_channels, inner, 1)
        self.key = nn.Conv2d(student_channels, inner, 1)
        self.value = nn.Conv2d(student_channels, teacher_channels, 1)
        self.channel_units = nn.Linear(1, masks, bias=False)
        self.spatial_units = nn.Linear(teacher_channels, masks, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M, C) and (N, M, H W). Raises ValueError for other channels than those that it was built for."""
        built, got = (self.key.in_channels, self.query.in_channels), (student.shape[1], teacher.shape[1])
        if built != got:
            wanted = f"{built[0]} channels of the student and {built[1]} of the teacher"
            raise ValueError(f"the loss was built for {wanted}, got {got[0]} and {got[1]}")
        student, teacher = as_parameters(student, self), as_parameters(teacher, self)
        query, key, value = (_positions(x) for x in (self.query(teacher), self.key(student), self.value(student)))
        # The kernels without a matrix of all pairs want each vector in one piece and, on a CPU, all of one length; zeros leave the
        # products as they are. Padding copies; the value of NCHW maps is copied here.
        missing, value = (0, value.shape[-1] - query.shape[-1]), value.contiguous()
        scale = self.query.out_channels**-0.5
        joint = F.scaled_dot_product_attention(F.pad(query, missing), F.pad(key, missing), value, scale=scale)[:, 0]
        of_channels, of_positions = self.channel_units(joint.mean(1)[:, :, None]), self.spatial_units(joint)
        channel, spatial = (accumulate(x).sigmoid().transpose(1, 2) for x in (of_channels, of_positions))
        return channel, spatial


def _positions(x: Tensor) -> Tensor:
    """(N, 1, H W, C) of (N, C, H, W): one head."""
    return x.flatten(2).transpose(1, 2)[:, None]


def _shares(masks: Tensor) -> Tensor:
    """(N, K): the sum over m of masks (N, M, K), each divided by its own sum; those that have vanished altogether weigh nothing."""
    return quotient(masks, masks.sum(2, keepdim=True)).sum(1)


def _overlap(masks: Tensor) -> Tensor:
    """(N,): sum_{i != j} 2 M_i.M_j / (|M_i|^2 + |M_j|^2) of masks (N, M, K)."""
    with torch.autocast(masks.device.type, enabled=False):
        products = torch.bmm(masks, masks.transpose(1, 2))
    squares = products.diagonal(dim1=1, dim2=2)
    itself = torch.eye(masks.shape[1], dtype=torch.bool, device=masks.device)
    return quotient(2 * products, squares[:, :, None] + squares[:, None]).masked_fill(itself, 0).sum((1, 2))


def _imitation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], channel: Sequence[Tensor], spatial: Sequence[Tensor]
) -> dict[str, Tensor]:
    """sum (s - t)^2 weighted by channel (N, C) and weighted by spatial (N, H, W), each (L, N), with a gradient to s and the weights.

    The kernels take weights for constants. What these multiply are two small sums of (s - t)^2, so that no tensor of the features' size is
    kept for them.
    """
    wanted = [
        (ImitationTerm(teacher, None, [w.detach() for w in channel]), 1.0),
        (ImitationTerm(teacher, [w.detach() for w in spatial], None), 1.0),
    ]
    found = dict(zip(("channel", "spatial"), ops.terms(student, wanted), strict=True))
    of_channels, of_positions = [], []
    with torch.no_grad():
        for s, t in zip(student, teacher, strict=True):
            error = (accumulate(s) - accumulate(t)).square_()
            of_channels.append(error.sum((2, 3)))
            of_positions.append(error.sum(1))
    for term, weights, errors in (("channel", channel, of_channels), ("spatial", spatial, of_positions)):
        own = stack_levels([(w * e).flatten(1).sum(1) for w, e in zip(weights, errors, strict=True)])
        found[term] = found[term] + (own - own.detach())
    return found
