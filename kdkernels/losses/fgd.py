"""FGD: focal and global distillation (arXiv 2111.11837)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .. import ops
from ..ops.attention import check_temperature
from ..ops.box_mask import background
from ..ops.terms import AttentionTerm, ImitationTerm
from ..pyramid import Gradients, Pyramid, accumulate, check_choice, products, stack_levels
from .base import Method, level_masks, preset_options
from .bmfi import MASKS
from .composed import ComposedLoss, Given, Part, Read, Reading, student_levels
from .gc_block import Relation
from .trainable import Trainable


class FGDSide(NamedTuple):
    """The teacher's part of a FGDLoss."""

    features: list[Tensor]  # (N, C, H, W), detached
    names: list[str]
    spatial: list[Tensor]  # attention S (N, H, W)
    channel: list[Tensor]  # attention Ch (N, C)
    masks: list[Tensor] | None  # M (N, H, W)
    region: Sequence[Tensor | None] | None  # M * S
    background: list[Tensor] | None  # B * S
    means: list[Tensor] | None  # (N, C) over the pixels, for the relation
    more: Any = None  # what a variant keeps besides


class FGDLoss(Trainable, ComposedLoss):
    """Focal and global distillation (arXiv 2111.11837; yzd-v/FGD).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). With S and Ch the teacher's
    attention (`kdkernels.reference.attention`), M the box mask and E = sum_c Ch * (F_S - F_T)^2, per image and level:

    foreground = alpha   / N * sum_hw M * S * E
    background = beta    / N * sum_hw B * S * E,   B = 1[M = 0] / the number of such cells
    attention  = gamma   / N * (sum_c |Ch(F_S) - Ch(F_T)| + sum_hw |S(F_S) - S(F_T)|)
    relation   = lambda_ / N * sum_chw (GcB_S(F_S) - GcB_T(F_T))^2

    GcB are global context blocks (`kdkernels.losses.gc_block`), one a level for each network, both trained. A term whose coefficient is 0
    is not computed; without the relation nothing is trained. Student and teacher need equal channels and sizes (adapter). The entries
    (L, N) are separable.

    weight:      factor of the loss
    preset:      alpha, beta, gamma, lambda_ and temperature of the source: one-stage (RetinaNet, GFL) | two-stage | fcos
    temperature: of the attention
    mask:        area (FGD) | gaussian | exponential | binary: see `kdkernels.reference.box_mask`
    seed:        of the blocks' initial weights;   reduction, on_nonfinite: see DistillationLoss
    """

    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "fgd",
            "focal and global distillation",
            "arXiv 2111.11837; yzd-v/FGD",
            "1/N * (alpha sum M S Ch (F_S - F_T)^2 + beta sum B S Ch (F_S - F_T)^2 + gamma (|Ch_S - Ch_T|_1 + |S_S - S_T|_1)"
            " + lambda |GcB_S(F_S) - GcB_T(F_T)|^2)",
            "separable",
        ),
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "one-stage": {"alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5, "mask": "area"},
        "two-stage": {"alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5, "mask": "area"},
        "fcos": {"alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6, "temperature": 0.8, "mask": "area"},
    }
    compares_features = True
    argument_names: tuple[str, ...] = ("student_features", "teacher_features", "boxes", "image_size")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        lambda_: float | None = None,
        temperature: float | None = None,
        mask: str | None = None,
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        super().__init__(weight, reduction, on_nonfinite)
        given = {"alpha": alpha, "beta": beta, "gamma": gamma, "lambda_": lambda_, "temperature": temperature, "mask": mask}
        chosen = preset_options(self.PRESETS, preset, **given)
        self.alpha, self.beta, self.gamma, self.lambda_ = (chosen[name] for name in ("alpha", "beta", "gamma", "lambda_"))
        self.preset, self.temperature, self.mask, self.seed = preset, chosen["temperature"], chosen["mask"], seed
        check_choice("mask", self.mask, MASKS)
        check_temperature(self.temperature)
        if not any((self.alpha, self.beta, self.gamma, self.lambda_)):
            raise ValueError(f"{type(self).__name__}: alpha, beta, gamma and lambda_ are all 0, so there is nothing to compute")
        self.needs = frozenset({"boxes"} if self.alpha or self.beta else ())

    def coefficients(self) -> dict[str, float]:
        """Name of each term -> its coefficient."""
        return {"foreground": self.alpha, "background": self.beta, "attention": self.gamma, "relation": self.lambda_}

    def coefficient(self, term: str) -> float:
        return self.weight * self.coefficients()[term]

    def forward(
        self, student_features: Pyramid, teacher_features: Pyramid, boxes: Any = None, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none".

        boxes: list of (n_i, 4) xyxy pixels, or (padded (N, M, 4), counts (N,)); image_size: (H, W) in pixels that the features cover.
        Both may be left out when alpha and beta are 0. Raises ValueError for a missing argument or shapes that do not fit, naming both
        sides' level shapes.
        """
        return self.evaluate(student_features, teacher_features, boxes=boxes, image_size=image_size)

    def trains(self) -> bool:
        return bool(self.lambda_)

    def shares(self) -> bool:
        # The relation is not one of the library's terms.
        return not self.trains()

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        return Relation(student, teacher, align=not self.compares_features)

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        return Reading(temperature=self.temperature)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> FGDSide:
        assert read.spatial is not None and read.channel is not None  # the reading asks for them
        wanted = self.coefficients()
        masks = region = outside = None
        if "boxes" in self.needs:
            # The student's gradients come later.
            self.require({**given, "student_gradients": ()})
            masks = level_masks(features, given["boxes"], given["image_size"], self.mask)
            region = products(masks, read.spatial) if wanted["foreground"] else None
            outside = products([background(m) for m in masks], read.spatial) if wanted.get("background") else None
        means = ops.channel_mean(features) if self.lambda_ else None
        return FGDSide(features, names, read.spatial, read.channel, masks, region, outside, means)

    def parts(self, student_features: Pyramid, side: FGDSide, student_gradients: Gradients | None = None) -> dict[str, Part]:
        features, _ = student_levels(student_features, side.names, side.features)
        images = max(features[0].shape[0], 1) if features else 1
        parts = {}
        # They differ in their spatial weights and factors only.
        for term, weights in (("foreground", side.region), ("background", side.background)):
            if weights is not None:
                parts[term] = Part(ImitationTerm(side.features, weights, side.channel), self.coefficient(term) / images)
        if self.gamma:
            attention = AttentionTerm(side.spatial, side.channel, self.temperature)
            parts["attention"] = Part(attention, self.coefficient("attention") / images)
        if self.lambda_:
            parts["relation"] = Part(ImitationTerm(side.features, None, None), self.coefficient("relation") / images)
        return parts

    def terms(self, student_features: Pyramid, side: FGDSide, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        if not self.trains() or not side.features:
            return super().terms(student_features, side, student_gradients)
        axes = "NCHW" if self.compares_features else "NHW"
        features, _ = student_levels(student_features, side.names, side.features, axes)
        self.build(features, side.features)
        assert self.trainable is not None and side.means is not None  # there is a relation
        compared, shifts = self.trainable(features, side.features)
        found = self.composed(features, compared, side, student_gradients)
        factor = self.coefficient("relation") / max(features[0].shape[0], 1)
        found["relation"] = found["relation"] + factor * _shift(compared, shifts, side.means)
        return found

    def composed(
        self, features: list[Tensor], compared: list[Tensor], side: FGDSide, student_gradients: Gradients | None
    ) -> dict[str, Tensor]:
        """The values of `parts`; features: the student's, compared: the same in the teacher's channels."""
        return super().terms(compared, side, student_gradients)


def _shift(features: Sequence[Tensor], shifts: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """What the blocks add to sum (F_S - F_T)^2, (L, N): they shift F_S - F_T by a d (N, C) that is the same at all positions.

    sum (F_S - F_T + d)^2 = sum (F_S - F_T)^2 + H W sum_c d (2 m + d), m the mean of F_S - F_T over the pixels: no tensor of the
    features' size is made. A shift can take away a channel's mean but not its spread over the pixels, so that the sum stays of the
    order of what it is made from, and little of its digits is lost.

    features: of the student;   shifts: d;   means: (N, C) of the teacher's features over the pixels.
    """
    rows = []
    for x, shift, own, other in zip(features, shifts, ops.channel_mean(features), means, strict=True):
        d = accumulate(shift)
        rows.append((d * (2 * (own - other) + d)).sum(1) * (x.shape[2] * x.shape[3]))
    return stack_levels(rows)
