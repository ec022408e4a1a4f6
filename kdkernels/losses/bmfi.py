"""BMFI: bounding-box-aware multi-grained feature imitation (arXiv 2303.04240; formulas of the authors' released code)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.box_mask import background, check_mask_options
from ..ops.terms import AttentionTerm, ImitationTerm
from ..pyramid import Gradients, Pyramid, check_choice, products
from .base import Method, check_kind, level_masks
from .composed import ComposedLoss, Given, Part, Read, Reading, student_levels

MASKS = ("gaussian", "exponential", "area", "binary")
ATTENTION_SOURCES = ("teacher", "mean")


class BMFISide(NamedTuple):
    """The teacher's part of a BMFILoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    spatial: list[Tensor]  # attention S (N, H, W)
    channel: list[Tensor]  # attention Ch (N, C)
    region: list[Tensor] | None  # M * S (N, H, W), or M where S is the mean of both networks'
    background: list[Tensor] | None  # B * S, or B


class BMFILoss(ComposedLoss):
    """Box-aware imitation at several grains.

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). With S and Ch the teacher's
    attention (`kdkernels.reference.attention`), M the box mask and E = sum_c Ch * (F_S - F_T)^2, per image and level:

    region     = alpha   / N       * sum_hw M * S * E
    attention  = gamma   / N       * (sum_c |Ch(F_S) - Ch(F_T)| + sum_hw |S(F_S) - S(F_T)|)
    whole      = lambda_ / (N H W) * sum_hw S * E
    background = beta_bg / N       * sum_hw B * S * E,   B = 1[M = 0] / the number of such cells

    A term whose coefficient is 0 is not computed. Student and teacher need equal channels and sizes (adapter).

    weight:         factor of the loss
    temperature:    of the attention
    mask:           gaussian | exponential | area (FGD) | binary, with `expand`, `placement`, `inner_ones`, `area_norm`: see
                    `kdkernels.reference.box_mask`
    attention_from: teacher | mean (S and Ch of the imitation are the detached mean of both networks', as FBKD)
    reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "bmfi",
            "bounding-box-aware multi-grained feature imitation",
            "arXiv 2303.04240; lanqz7766/GKD, GKD_BMFI_FeatureLoss",
            "alpha/N * sum M S Ch (F_S - F_T)^2 + gamma/N * (|Ch_S - Ch_T|_1 + |S_S - S_T|_1) + lambda/(N H W) * sum S Ch (F_S - F_T)^2",
            "separable",
        ),
    )
    compares_features = True
    argument_names = ("student_features", "teacher_features", "boxes", "image_size")

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 1e-3,
        gamma: float = 1e-3,
        lambda_: float = 0.0,
        beta_bg: float = 0.0,
        temperature: float = 0.5,
        mask: str = "gaussian",
        expand: float = 2.0,
        inner_ones: bool = True,
        area_norm: bool = True,
        placement: str = "centered",
        attention_from: str = "teacher",
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        super().__init__(weight, reduction, on_nonfinite)
        factors = {"alpha": alpha, "gamma": gamma, "lambda_": lambda_, "beta_bg": beta_bg, "temperature": temperature, "expand": expand}
        for name, value in factors.items():
            check_kind(name, value, 1.0)
        check_kind("inner_ones", inner_ones, True)
        check_kind("area_norm", area_norm, True)
        check_choice("mask", mask, MASKS)
        check_choice("attention_from", attention_from, ATTENTION_SOURCES)
        check_mask_options(mask, expand, placement)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        if not any((alpha, gamma, lambda_, beta_bg)):
            raise ValueError("BMFILoss: alpha, gamma, lambda_ and beta_bg are all 0, so there is nothing to compute")
        self.alpha, self.gamma, self.lambda_, self.beta_bg = alpha, gamma, lambda_, beta_bg
        self.temperature, self.attention_from = temperature, attention_from
        self.mask, self.expand, self.inner_ones, self.area_norm, self.placement = mask, expand, inner_ones, area_norm, placement
        self.needs = frozenset({"boxes"} if alpha or beta_bg else ())

    def forward(
        self, student_features: Pyramid, teacher_features: Pyramid, boxes: Any = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none".

        boxes: list of (n_i, 4) xyxy pixels, or (padded (N, M, 4), counts (N,)); image_size: (H, W) in pixels that the features cover.
        Both may be left out when alpha and beta_bg are 0. Raises ValueError for a missing argument or shapes that do not fit, naming
        both sides' level shapes.
        """
        return self.evaluate(student_features, teacher_features, boxes=boxes, image_size=image_size)

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        return Reading(temperature=self.temperature)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> BMFISide:
        assert read.spatial is not None and read.channel is not None  # the reading asks for them
        region = outside = None
        if self.needs:
            boxes, image_size = given["boxes"], given["image_size"]
            self.require({"boxes": boxes, "image_size": image_size})
            masks = level_masks(features, boxes, image_size, self.mask, self.expand, self.placement, self.inner_ones, self.area_norm)
            region = masks if self.alpha else None
            outside = [background(m) for m in masks] if self.beta_bg else None
            if self.attention_from == "teacher":
                region, outside = _weighted(region, read.spatial), _weighted(outside, read.spatial)
        return BMFISide(features, names, read.spatial, read.channel, region, outside)

    def parts(self, student_features: Pyramid, side: BMFISide, student_gradients: Gradients | None = None) -> dict[str, Part]:
        features, _ = student_levels(student_features, side.names, side.features)
        factor = self.weight / (max(features[0].shape[0], 1) if features else 1)
        spatial, channel, region, outside = side.spatial, side.channel, side.region, side.background
        if self.attention_from == "mean":
            with torch.no_grad():
                own = ops.attention(features, self.temperature)
                spatial = [(a + b) / 2 for a, b in zip(own[0], spatial, strict=True)]
                channel = [(a + b) / 2 for a, b in zip(own[1], channel, strict=True)]
                region, outside = _weighted(region, spatial), _weighted(outside, spatial)
        # The grains differ in their spatial weights and factors only.
        grains: dict[str, tuple[list[Tensor], float]] = {}
        if region is not None:
            grains["region"] = region, self.alpha
        if self.lambda_:
            grains["whole"] = [s / (s.shape[1] * s.shape[2]) for s in spatial], self.lambda_
        if outside is not None:
            grains["background"] = outside, self.beta_bg
        parts = {name: Part(ImitationTerm(side.features, weights, channel), factor * own) for name, (weights, own) in grains.items()}
        if self.gamma:
            parts["attention"] = Part(AttentionTerm(side.spatial, side.channel, self.temperature), factor * self.gamma)
        return parts


def _weighted(masks: list[Tensor] | None, spatial: list[Tensor]) -> list[Tensor] | None:
    return None if masks is None else products(masks, spatial)
