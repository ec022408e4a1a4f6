"""FGD under class activation maps: the CAM variants of the GKD authors (lanqz7766/AID)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.terms import ImitationTerm, MapTerm
from ..pyramid import Gradients, Pyramid, accumulate, check_choice
from .base import Method
from .composed import Given, Part, Read, Reading, maps_of, student_levels
from .fgd import FGDLoss, FGDSide
from .gkd import GKDLoss, GKDSide

VARIANTS = ("both", "teacher")


class Cams(NamedTuple):
    """What a CamLoss keeps of the teacher besides FGD's part."""

    maps: GKDSide  # before normalisation
    normalized: list[Tensor | None]  # (N, H, W), None for a level without a gradient


class CamLoss(FGDLoss):
    """FGD whose imitation of the boxes is weighted by class activation maps (lanqz7766/AID, Cam_Gmask_ and Teacher_Cam_FeatureLoss).

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64). CAM are GKD's maps of preset
    "release": minmax(relu(sum_c w_c |A_c|)), w_c = mean_hw |dL_det/dA_c|, each network's from its own gradients. With M the gaussian box
    mask and S and Ch the teacher's attention, per image and level:

    foreground = alpha / N * sum_chw M * S * Ch * (sqrt(CAM_S) * F_S - sqrt(CAM_T) * F_T)^2      the CAMs detached
    cam        = beta / N * sum_hw sqrt(M) * |CAM_S - CAM_T|                                     through the student's features
    attention and relation as FGDLoss, with gamma and lambda_

    variant="teacher" has CAM_T on both sides and no term cam; it needs the teacher's gradients only. A term whose coefficient is 0 is not
    computed; a level without a gradient has no foreground and no cam. Student and teacher need equal sizes. Where channels differ, the
    variant "both" with a relation aligns the compared features by a trained 1x1 convolution a level, its maps being of the student's own
    features; without a relation it needs equal channels. For the variant "teacher" the caller aligns (adapter). The entries (L, N) are
    separable.

    weight:   factor of the loss
    preset:   one-stage (of the source) | two-stage (the source has none: FGD's for two-stage detectors, with beta of one-stage)
    variant:  both | teacher
    eps_mode: of the maps' normalisation: absolute (the released code) | relative (independent of the gradients' scale)
    temperature, mask, seed: see FGDLoss;   reduction, on_nonfinite: see DistillationLoss
    """

    methods = (
        Method(
            "cam-gmask",
            "FGD under the activation maps of both networks",
            "lanqz7766/AID, Cam_Gmask_FeatureLoss",
            "1/N * (alpha sum M S Ch (sqrt(CAM_S) F_S - sqrt(CAM_T) F_T)^2 + beta sum sqrt(M) |CAM_S - CAM_T|"
            " + gamma (|Ch_S - Ch_T|_1 + |S_S - S_T|_1) + lambda |GcB_S(F_S) - GcB_T(F_T)|^2)",
            "separable",
        ),
        Method(
            "teacher-cam",
            "FGD under the teacher's activation maps",
            "lanqz7766/AID, Teacher_Cam_FeatureLoss",
            "1/N * (alpha sum M S Ch CAM_T (F_S - F_T)^2 + gamma (|Ch_S - Ch_T|_1 + |S_S - S_T|_1) + lambda |GcB_S(F_S) - GcB_T(F_T)|^2)",
            "separable",
            {"variant": "teacher", "beta": 0.0},
            lacks=("beta",),
        ),
    )
    PRESETS = {
        "one-stage": {"alpha": 1e-3, "beta": 0.05, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5, "mask": "gaussian"},
        "two-stage": {"alpha": 5e-5, "beta": 0.05, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5, "mask": "gaussian"},
    }
    argument_names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients", "boxes", "image_size")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "one-stage",
        variant: str = "both",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        lambda_: float | None = None,
        temperature: float | None = None,
        mask: str | None = None,
        eps_mode: str = "absolute",
        reduction: str = "sum",
        on_nonfinite: str = "flag",
        seed: int = 0,
    ):
        if variant == "teacher":
            if beta:
                raise ValueError(f'beta weighs the distance of both maps, which variant="teacher" does not have: choose 0; got {beta}')
            beta = 0.0
        super().__init__(weight, preset, alpha, beta, gamma, lambda_, temperature, mask, reduction, on_nonfinite, seed)
        check_choice("variant", variant, VARIANTS)
        self.variant, self.eps_mode = variant, eps_mode
        self._gkd = GKDLoss(preset="release", eps_mode=eps_mode, average="n")
        # With parts to train the loss aligns channels itself, for the maps are of the student's own features.
        self.compares_features = variant == "teacher" or not self.lambda_
        self.needs = frozenset({"boxes", "teacher_gradients", *(["student_gradients"] if variant == "both" else [])})

    def inline_refusal(self) -> str | None:
        if self.variant == "teacher":
            return None
        if self.lambda_:
            return (
                'variant="both" needs the student\'s gradients, and parts that train cannot be evaluated where these are; choose lambda_=0'
            )
        return self._gkd.inline_refusal()

    def coefficients(self) -> dict[str, float]:
        cam = {"cam": self.beta} if self.variant == "both" else {}
        return {"foreground": self.alpha, **cam, "attention": self.gamma, "relation": self.lambda_}

    #: GKD's arguments.
    forward = GKDLoss.forward  # type: ignore[assignment]

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        return self._gkd.reading(features, names, given)._replace(temperature=self.temperature)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> FGDSide:
        side, maps = super().side(features, names, read, given), self._gkd.side(features, names, read, given)
        cams = [self._normalized(r) for r in maps.maps]
        if self.variant == "teacher" and side.region is not None:
            side = side._replace(region=_weighted(side.region, cams))
        return side._replace(more=Cams(maps, cams))

    def parts(self, student_features: Pyramid, side: FGDSide, student_gradients: Gradients | None = None) -> dict[str, Part]:
        features, _ = student_levels(student_features, side.names, side.features)
        return self._parts(features, features, side, student_gradients)

    def composed(
        self, features: list[Tensor], compared: list[Tensor], side: FGDSide, student_gradients: Gradients | None
    ) -> dict[str, Tensor]:
        parts = self._parts(features, compared, side, student_gradients)
        aligned = any(a is not b for a, b in zip(features, compared, strict=True))
        # A map is made of features and gradients of the same channels, which are the student's own.
        own = [name for name in parts if name == "cam" and aligned]
        found: dict[str, Tensor] = {}
        for levels, names in ((compared, [name for name in parts if name not in own]), (features, own)):
            if names:
                found |= zip(names, ops.terms(levels, [(parts[name].term, parts[name].factor) for name in names]), strict=True)
        return found

    def _parts(self, features: list[Tensor], compared: list[Tensor], side: FGDSide, student_gradients: Gradients | None) -> dict[str, Part]:
        parts = super().parts(compared, side, student_gradients)
        if self.variant == "teacher":
            return parts
        term = self._gkd.parts(features, side.more.maps, student_gradients)["map"].term
        assert isinstance(term, MapTerm) and side.masks is not None  # GKD's one term; the boxes are always needed
        if self.beta:
            parts["cam"] = Part(term._replace(spatial=[m.sqrt() for m in side.masks]), self.coefficient("cam"))
        if "foreground" in parts:
            with torch.no_grad():
                maps = maps_of([x.detach() for x in features], term.weights, term.activation, term.rectify)
                imitation = self._foreground(side, [self._normalized(r) for r in maps])
            parts["foreground"] = parts["foreground"]._replace(term=imitation)
        return parts

    def _foreground(self, side: FGDSide, cams: list[Tensor | None]) -> ImitationTerm:
        """sum M S Ch (a F_S - b F_T)^2 as sum (M S a^2) Ch (F_S - b/a F_T)^2, with a and b the roots of both CAMs.

        The student's features are then read as they are, together with the other terms. Where a is 0, as at a map's smallest value, it
        is replaced by a number that is nothing beside any root of a map, and whose square and inverse square are far from the ends of the
        type.
        """
        assert side.region is not None  # there is a foreground
        target: list[Tensor] = list(side.features)
        squares: list[Tensor | None] = [None] * len(target)
        for level, (own, other, x) in enumerate(zip(cams, side.more.normalized, side.features, strict=True)):
            if own is None or other is None:
                continue
            a = own.sqrt().clamp(min=torch.finfo(own.dtype).tiny ** 0.25)
            target[level], squares[level] = accumulate(x) * (other.sqrt() / a)[:, None], a * a
        return ImitationTerm(target, _weighted(side.region, squares), side.channel)

    def _normalized(self, raw: Tensor | None) -> Tensor | None:
        options = self._gkd
        return None if raw is None else ops.normalize_map(raw, options.normalize, options.eps, options.eps_mode)


def _weighted(region: Sequence[Tensor | None], cams: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None or b is None else a * b for a, b in zip(region, cams, strict=True)]
