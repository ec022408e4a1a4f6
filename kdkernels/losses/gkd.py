"""GKD: gradient-guided knowledge distillation (arXiv 2303.04240), as maps or as weights of a feature imitation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.map_distance import AVERAGES, DISTANCES, check_map_options
from ..ops.terms import ImitationTerm, MapTerm
from ..ops.weighted_channel_sum import ACTIVATIONS, RECTIFIERS
from ..pyramid import Gradients, Pyramid, accumulate, as_pyramid, check_choice, check_match
from .base import Method, check_kind, level_masks, preset_options
from .composed import ComposedLoss, Given, Part, Read, Reading, student_levels

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "channel_weight": "signed",
        "activation": "raw",
        "rectify": "abs",
        "normalize": "minmax",
        "distance": "l1",
        "eps": 1e-6,
        "eps_mode": "relative",
    },
    "release": {
        "channel_weight": "abs",
        "activation": "abs",
        "rectify": "relu",
        "normalize": "minmax",
        "distance": "l1",
        "eps": 1e-7,
        "eps_mode": "absolute",
    },
}
FORMS = ("map", "imitation")
CHANNEL_WEIGHTS = ("signed", "abs", "elementwise")
BOX_WEIGHTS = ("none", "sqrt_mask")
GRAD_MODES = ("detached_weights", "second_order", "none")


class GKDSide(NamedTuple):
    """The teacher's part of a GKDLoss. A level without a gradient is None in every list."""

    shapes: list[tuple[int, ...]]  # of the teacher's features
    names: list[str]
    maps: list[Tensor | None]  # (N, H, W) before normalisation; of the imitation form: its spatial weights
    boxes: Any
    image_size: tuple[int, int] | None
    features: list[Tensor] | None = None  # imitation only
    channel: list[Tensor | None] | None = None  # imitation only: (N, C), the normaliser included


class GKDLoss(ComposedLoss):
    """Gradient-guided distillation.

    Takes pyramids of (N, C, H, W) in 16 bit, fp32 or fp64; maths and result are fp32 (fp64 for fp64).

    form="map" (arXiv 2303.04240, Eq. 1-4): per image and level, each network's map is M = normalize(rectify(sum_c w_c * activation(A_c))),
    w_c its channel weights from the gradients of its own detection loss at its features; the loss is sum_hw distance(M_S, M_T) / (N H W).
    Needs the gradients of both; channels may differ, the teacher's map is resized where sizes differ.
    form="imitation": 1/(N C H W) * sum spatial * channel * (F_S - F_T)^2 with channel = C |w_c| / sum_c |w_c| and spatial = the teacher's
    M, or 1 (`spatial=False`), times the gaussian box mask if boxes are given. Needs the teacher's gradients only, and equal channels and
    sizes.

    weight:         factor of the loss
    preset:         "paper" or "release": the options that are None take its values (`PRESETS`)
    channel_weight: signed (mean of g, Eq. 1) | abs (mean of |g|, released) | elementwise (w = |g|; imitation's channel factor is abs's)
    activation:     raw | abs (released);   rectify: abs (Eq. 3) | relu (released) | none
    normalize:      minmax | softmax (with `temperature`) | zscore | none, see `kdkernels.reference.map_distance.normalize_map`
    distance:       l1 | mse | smooth_l1;   average: nhw | n (divides by N only)
    eps, eps_mode:  relative (independent of the gradients' scale) | absolute (released)
    box_weight:     none | sqrt_mask: both maps are multiplied by the root of the gaussian box mask (map form; needs boxes)
    grad_mode:      detached_weights | second_order (the student's weights keep their graph: its gradients must come from
                    create_graph=True) | none (value only)
    reduction, on_nonfinite: see DistillationLoss

    A level whose gradient is None contributes 0, and so does, in the imitation form, an image with sum_c |w_c| = 0.
    """

    methods = (
        Method(
            "gkd",
            "gradient-guided distillation, maps",
            "arXiv 2303.04240, Eq. 1-4; lanqz7766/GKD",
            "1/(N H W) * sum_hw |M_S - M_T|,  M = minmax(|sum_c w_c A_c|),  w_c = mean_hw dL_det/dA_c",
            "separable",
        ),
        Method(
            "gkd-imitation",
            "gradient-weighted feature imitation",
            "arXiv 2303.04240, abstract; the form is this library's",
            "1/(N C H W) * sum M_T * C |w_c| / (sum_c |w_c|) * (F_S - F_T)^2",
            "separable",
            {"form": "imitation"},
        ),
        Method(
            "cam-only",
            "GKD's maps inside the boxes",
            "lanqz7766/AID, Cam_only_FeatureLoss",
            "weight/N * sum_hw sqrt(M_box) * |M_S - M_T|,  M = minmax(relu(sum_c mean_hw|g_c| |A_c|))",
            "separable",
            {"preset": "release", "box_weight": "sqrt_mask", "average": "n", "weight": 0.1},
        ),
    )
    PRESETS = PRESETS
    argument_names = ("student_features", "teacher_features", "student_gradients", "teacher_gradients", "boxes", "image_size")

    def __init__(
        self,
        weight: float = 1.0,
        preset: str = "paper",
        form: str = "map",
        spatial: bool = True,
        channel_weight: str | None = None,
        activation: str | None = None,
        rectify: str | None = None,
        normalize: str | None = None,
        distance: str | None = None,
        eps: float | None = None,
        eps_mode: str | None = None,
        temperature: float = 0.5,
        average: str = "nhw",
        box_weight: str = "none",
        grad_mode: str = "detached_weights",
        reduction: str = "sum",
        on_nonfinite: str = "flag",
    ):
        super().__init__(weight, reduction, on_nonfinite)
        given = {"channel_weight": channel_weight, "activation": activation, "rectify": rectify, "normalize": normalize}
        chosen = preset_options(PRESETS, preset, **given, distance=distance, eps=eps, eps_mode=eps_mode)
        check_kind("spatial", spatial, True)
        check_kind("temperature", temperature, 0.5)
        self.preset, self.form, self.spatial = preset, form, spatial
        self.channel_weight, self.activation, self.rectify, self.normalize = (chosen[name] for name in given)
        self.distance, self.eps, self.eps_mode = chosen["distance"], chosen["eps"], chosen["eps_mode"]
        self.temperature, self.average, self.box_weight, self.grad_mode = temperature, average, box_weight, grad_mode
        self._check_options()
        needs = {"teacher_gradients"}
        if form == "map":
            needs.add("student_gradients")
        if box_weight != "none":
            needs.add("boxes")
        self.needs = frozenset(needs)
        self.compares_features = form == "imitation"

    def inline_refusal(self) -> str | None:
        if self.form != "map":
            return None
        if self.grad_mode == "second_order":
            return 'grad_mode="second_order" needs a graph of the student\'s gradients'
        if self.normalize != "minmax":
            return f'normalize="{self.normalize}" depends on the scale of the student\'s gradients'
        if self.eps_mode == "absolute":
            return 'eps_mode="absolute" depends on the scale of the student\'s gradients'
        return None

    def forward(
        self,
        student_features: Pyramid,
        teacher_features: Pyramid,
        student_gradients: Gradients | None = None,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Scalar, or (L, N) with reduction="none". Gradients have their features' shapes; boxes and image_size are those of `ops.box_mask`.

        Raises ValueError for a missing argument or shapes that do not fit, naming both sides' level shapes.
        """
        return self.evaluate(
            student_features,
            teacher_features,
            student_gradients=student_gradients,
            teacher_gradients=teacher_gradients,
            boxes=boxes,
            image_size=image_size,
        )

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        gradients = self._gradients("teacher", given.get("teacher_gradients"), features, names)
        if self.form == "imitation" and not self.spatial:
            return Reading()
        return Reading(self._weights(gradients), self.activation, self.rectify)

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> GKDSide:
        shapes, maps = [tuple(x.shape) for x in features], read.maps or []
        boxes, image_size = given.get("boxes"), given.get("image_size")
        if self.form == "map":
            return GKDSide(shapes, names, maps, boxes, image_size)
        gradients = self._gradients("teacher", given.get("teacher_gradients"), features, names)
        weights = self._spatial_weights(features, maps, boxes, image_size)
        return GKDSide(shapes, names, weights, boxes, image_size, features, self._channel_factors(features, gradients, read.weights))

    def parts(self, student_features: Pyramid, side: GKDSide, student_gradients: Gradients | None = None) -> dict[str, Part]:
        detached = self.grad_mode == "none"
        if self.form == "imitation":
            student_levels(student_features, side.names, side.shapes)
            assert side.features is not None and side.channel is not None  # the imitation form's side has both
            return {"imitation": Part(ImitationTerm(side.features, side.maps or None, side.channel), self.weight, detached)}
        features, names = student_levels(student_features, side.names, side.shapes, "N")
        gradients = self._gradients("student", student_gradients, features, names)
        if self.grad_mode != "second_order":
            gradients = [None if g is None else g.detach() for g in gradients]
        # A level without a teacher's map contributes nothing: its student's weights need not be made.
        gradients = [None if m is None else g for g, m in zip(gradients, side.maps, strict=True)]
        spatial = None
        if self.box_weight == "sqrt_mask":
            spatial = [m.sqrt() for m in level_masks(features, side.boxes, side.image_size)]
        term = MapTerm(
            self._weights(gradients),
            side.maps,
            spatial,
            self.activation,
            self.rectify,
            self.normalize,
            self.distance,
            self.eps,
            self.eps_mode,
            self.temperature,
            self.average,
        )
        return {"map": Part(term, self.weight, detached)}

    def _weights(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Channel weights (N, C) of the levels with gradients, or a weight per element."""
        if self.channel_weight == "elementwise":
            return [None if g is None else accumulate(g).abs() for g in gradients]
        return self._means(gradients, self.channel_weight)

    @staticmethod
    def _means(gradients: list[Tensor | None], mode: str) -> list[Tensor | None]:
        """`channel_mean` of the levels with gradients."""
        made = iter(ops.channel_mean([g for g in gradients if g is not None], mode))
        return [None if g is None else next(made) for g in gradients]

    def _spatial_weights(
        self, features: list[Tensor], maps: list[Tensor | None], boxes: Any, image_size: tuple[int, int] | None
    ) -> list[Tensor | None]:
        """Per level M_T * box mask; an empty list when both are 1 everywhere."""
        options = (self.normalize, self.eps, self.eps_mode, self.temperature)
        weights = [None if r is None else ops.normalize_map(r, *options) for r in maps]
        if boxes is None:
            return weights
        masks = level_masks(features, boxes, image_size)
        return [None if m is None else m * mask for m, mask in zip(weights, masks, strict=True)] if weights else list(masks)

    def _channel_factors(
        self, features: list[Tensor], gradients: list[Tensor | None], weights: list[Tensor | None] | None
    ) -> list[Tensor | None]:
        """|w_c| / sum_c |w_c| / (N H W): channel_c of mean 1, and the normaliser 1 / (N C H W); weights: the map's, if it has one."""
        if weights is None or self.channel_weight == "elementwise":
            weights = self._means(gradients, "signed" if self.channel_weight == "signed" else "abs")
        factors: list[Tensor | None] = []
        for x, w in zip(features, weights, strict=True):
            if w is None:
                factors.append(None)
                continue
            size = w.abs()
            total = size.sum(1, keepdim=True)
            elements = max(x.shape[0], 1) * x.shape[2] * x.shape[3]
            factors.append(torch.where(total == 0, 0, size / torch.where(total == 0, 1, total)) / elements)
        return factors

    @staticmethod
    def _gradients(side: str, gradients: Gradients | None, features: list[Tensor], names: Sequence[str]) -> list[Tensor | None]:
        if gradients is None:
            raise ValueError(f"GKDLoss needs {side}_gradients, which is missing")
        levels, keys = as_pyramid(f"{side}_gradients", gradients, optional=True)
        check_match(f"{side}_gradients", levels, keys, f"{side}_features", features, names)
        return levels

    def _check_options(self) -> None:
        check_choice("form", self.form, FORMS)
        check_choice("channel_weight", self.channel_weight, CHANNEL_WEIGHTS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("rectify", self.rectify, RECTIFIERS)
        check_choice("distance", self.distance, DISTANCES)
        check_choice("average", self.average, AVERAGES)
        check_choice("box_weight", self.box_weight, BOX_WEIGHTS)
        check_choice("grad_mode", self.grad_mode, GRAD_MODES)
        check_map_options(self.normalize, self.eps, self.eps_mode, self.temperature)
        if self.form == "imitation" and self.box_weight != "none":
            raise ValueError('box_weight is of form="map"; form="imitation" uses the box mask whenever boxes are given')
        signed_map = self.normalize == "zscore" or (self.normalize == "none" and self.rectify == "none")
        if self.form == "imitation" and self.spatial and signed_map:
            raise ValueError(f'normalize="{self.normalize}" gives negative spatial weights; form="imitation" needs another')
