"""What all losses share: the split into a teacher's side and terms, reduction, and the record of non-finite values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..backend import transformed
from ..ops.box_mask import check_boxes
from ..pyramid import Gradients, Pyramid, as_pyramid, check_choice, check_match, quotient, split_over_images
from ..reference.box_mask import Boxes, is_padded

REDUCTIONS = ("sum", "none")
ON_NONFINITE = ("flag", "raise")
#: In place of an image's number: all values were finite.
NOWHERE = 2**31 - 1
#: The teacher's own detection loss: all of it, or those of classification and of regression by name.
TeacherLosses = Tensor | float | Mapping[str, Any]
# The argument that each member of `DistillationLoss.needs` asks for.
ARGUMENTS = {
    "student_gradients": ("student_gradients",),
    "teacher_gradients": ("teacher_gradients",),
    "boxes": ("boxes", "image_size"),
    "teacher_losses": ("teacher_losses",),
    "outputs": ("student_outputs", "teacher_outputs"),
    "anchors": ("anchors",),
}
#: Of those what only some losses take in `teacher_side`.
HEAD_NEEDS = frozenset({"outputs", "anchors"})
#: How a method's (L, N) entries come about: each from its own level and image; from a level's total over the batch, split over its images
#: (`split_over_images`); or with a single row for all levels.
COUPLINGS = ("separable", "batch-coupled", "level-free")


class Method(NamedTuple):
    """A method as `kdkernels methods` lists it and `kdkernels distill --method` names it.

    name:     "fgd";   title: in words;   paper: where its formula stands, with the code that its defaults come from
    formula:  in plain text
    coupling: one of `COUPLINGS`; of a wrapper what it adds: see `inherits`
    options:  what the loss's constructor is given besides
    wraps:    it takes another loss, `base`
    lacks:    options of the loss that this method has no use for; no list of its defaults has them
    """

    name: str
    title: str
    paper: str
    formula: str
    coupling: str
    options: Mapping[str, Any] = {}
    wraps: bool = False
    lacks: tuple[str, ...] = ()

    @property
    def inherits(self) -> bool:
        """Whether entries and cost are those of the loss that it wraps: AID multiplies them, PAD has statistics of the batch besides."""
        return self.wraps and self.coupling == "separable"


class NonFinite(NamedTuple):
    """Where a value was NaN or infinite: the lowest image of one term and level, of all calls since the last look."""

    loss: str
    term: str
    level: int
    image: int


class NonFiniteError(FloatingPointError):
    """Raised by `on_nonfinite="raise"`; `found` lists where."""

    def __init__(self, found: Sequence[NonFinite]):
        self.found = list(found)
        places = "; ".join(f"{f.loss}, term {f.term}, level {f.level}, image {f.image}" for f in found)
        super().__init__(f"non-finite distillation loss: {places}")


class DistillationLoss(nn.Module):
    """Base of the losses.

    A loss is `reduce(terms(student_features, teacher_side(...), student_gradients))`. `teacher_side` holds everything that does not
    depend on the student, so that it can be made before the student's backward; `forward` puts the three together.

    A subclass lists in `methods` what it is known by, and in `PRESETS` the options of its sources by name: an option that is None takes the
    preset's value.

    weight:       factor of all terms
    reduction:    "sum" gives a scalar, "none" the (L, N) matrix of which it is the sum
    on_nonfinite: "flag" keeps a code on the device until `check()`; "raise" looks at every value at once, which synchronises, and
                  raises NonFiniteError
    """

    methods: ClassVar[tuple[Method, ...]] = ()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    needs: frozenset[str] = frozenset()
    compares_features: bool = False
    level_free: bool = False
    #: Whether the `student_outputs` that it needs are those of the teacher's head on the student's features.
    crosses: bool = False
    #: Under AID, the part of the teacher's loss that weighs a term, by the term's name: "classification" or "regression". Empty: the whole.
    weighed_by: Mapping[str, str] = {}
    #: Whether its `teacher_losses` are to come in these parts.
    by_parts: bool = False
    #: The parts with parameters of their own, once they are built: see `Trainable`.
    trainable: nn.Module | None
    argument_names: tuple[str, ...] = ("student_features", "teacher_features")

    def __init__(self, weight: float = 1.0, reduction: str = "sum", on_nonfinite: str = "flag"):
        super().__init__()
        check_kind("weight", weight, 1.0)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        # Not a default of the class, which would hide the module that nn.Module keeps under this name.
        self.trainable = None
        self.weight = float(weight)
        self.reduction = reduction
        self.on_nonfinite = on_nonfinite
        # One (terms, L) tensor a kind of call: the lowest image with a non-finite value, or NOWHERE. Not buffers: state_dict stays empty.
        self._flags: dict[tuple, Tensor] = {}

    def inline_refusal(self) -> str | None:
        """Why this loss cannot be computed inside the backward pass, where student gradients carry an unknown scale; None if it can."""
        return None

    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
    ) -> Any:
        """Everything that does not depend on the student, detached; to be passed to `terms`."""
        raise TypeError(f"{type(self).__name__} does not define teacher_side")

    def terms(self, student_features: Pyramid, side: Any, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        """Name of each term -> (L, N), fp32 (fp64 for fp64), with weight and normalisers inside.

        A loss that needs "outputs" takes `student_outputs` besides, and its `teacher_side` takes `teacher_outputs`; one that needs
        "anchors" takes in `teacher_side` the `anchors` of the teacher, (A_l, 4) xyxy in pixels a level.
        """
        raise TypeError(f"{type(self).__name__} does not define terms")

    def evaluate(self, student_features: Pyramid, teacher_features: Pyramid, **given: Any) -> Tensor:
        """The loss from all arguments by name (those of FusedLoss); raises ValueError when one that it needs is missing."""
        self.require(given)
        self.check_features(student_features, teacher_features)
        student_gradients = given.pop("student_gradients", None)
        outputs = {"student_outputs": given.pop("student_outputs")} if "outputs" in self.needs else {}
        side = self.teacher_side(teacher_features, **given)
        return self.reduce(self.terms(student_features, side, student_gradients, **outputs))

    def coefficient(self, term: str) -> float:
        """The factor inside the entries of this term, without the normalisers."""
        return self.weight

    def check_features(self, student_features: Pyramid, teacher_features: Pyramid) -> None:
        """Raises ValueError, naming both sides' level shapes, unless the loss can compare these."""
        student, student_names = as_pyramid("student_features", student_features)
        teacher, teacher_names = as_pyramid("teacher_features", teacher_features)
        axes = "NCHW" if self.compares_features else "N"
        check_match("student_features", student, student_names, "teacher_features", teacher, teacher_names, axes)

    def require(self, given: dict[str, Any], name: str | None = None) -> None:
        """Raises ValueError naming the loss and the argument unless `given` holds all that the loss needs."""
        for need in sorted(self.needs):
            for argument in ARGUMENTS[need]:
                if given.get(argument) is None:
                    label = type(self).__name__ if name is None else f"{name!r} ({type(self).__name__})"
                    raise ValueError(f"{label} needs {argument}, which is missing")

    def reduce(self, terms: dict[str, Tensor]) -> Tensor:
        """Sum of the terms, (L, N) or its sum by `reduction`; records non-finite values."""
        values = list(terms.values())
        total = values[0]
        for value in values[1:]:
            total = total + value
        result = total if self.reduction == "none" else total.sum()
        # The first call makes the flags, so that a graph compiled later finds them.
        key = (tuple(terms), total.shape[0], total.device)
        if key not in self._flags or not _known_finite(result):
            self._record(key, values)
        return result

    def check(self) -> list[NonFinite]:
        """Where values were non-finite since the last call: one entry a term and level, with the lowest image. Synchronises and clears."""
        found = []
        for (names, _, _), flags in self._flags.items():
            for term, row in zip(names, flags.tolist(), strict=True):
                found += [NonFinite(type(self).__name__, term, level, image) for level, image in enumerate(row) if image != NOWHERE]
            # Not thrown away: a CUDA graph that was captured goes on writing to it.
            flags.fill_(NOWHERE)
        return found

    def _record(self, key: tuple, values: list[Tensor]) -> None:
        with torch.no_grad():
            stacked = torch.stack([v.detach() for v in values]) if len(values) > 1 else values[0].detach()[None]
            if stacked.numel() == 0:
                return
            # x - x is 0 for every finite x and NaN for the others: half the launches of isfinite.
            image = torch.arange(stacked.shape[2], dtype=torch.int32, device=stacked.device)
            first = torch.where(stacked - stacked == 0, NOWHERE, image).amin(2)
            if key in self._flags:
                # In place: a captured CUDA graph reads and writes this very memory at every replay.
                self._flags[key].clamp_(max=first)
            else:
                # A tensor of inference mode could be written to in inference mode only.
                with torch.inference_mode(False):
                    self._flags[key] = first.clone()
            if self.on_nonfinite == "raise":
                found = self.check()
                if found:
                    raise NonFiniteError(found)


def _known_finite(result: Tensor) -> bool:
    """Whether the sum of these is finite, so that all that they are sums of are: asked only where nobody waits for the answer."""
    if torch.compiler.is_compiling() or type(result) is not Tensor or result.device.type != "cpu" or transformed():
        return False
    return math.isfinite(result.detach().sum().item())


def level_masks(features: Sequence[Tensor], boxes: Boxes, image_size: tuple[int, int] | None, *options: Any) -> list[Tensor]:
    """`ops.box_mask` for the levels of `features`, on their device.

    Raises ValueError unless there are boxes for each image, and an image size.
    """
    if image_size is None:
        raise ValueError("boxes were given without image_size, the (H, W) in pixels that the features cover")
    boxes = boxes_like(features, boxes)
    return ops.box_mask(boxes, image_size, [(x.shape[2], x.shape[3]) for x in features], *options) if len(features) else []


def boxes_like(features: Sequence[Tensor], boxes: Boxes) -> Boxes:
    """The boxes on the features' device. Raises ValueError unless there are boxes for each image."""
    check_boxes(boxes)
    if len(features) == 0:
        return boxes
    images = boxes[0].shape[0] if is_padded(boxes) else len(boxes)
    batch, device = features[0].shape[0], features[0].device
    if images != batch:
        raise ValueError(f"boxes are of {images} images, the features of {batch}")
    return [b.to(device) for b in boxes]


def preset_options(presets: Mapping[str, Mapping[str, Any]], preset: str, **given: Any) -> dict[str, Any]:
    """The given options, and of the preset those that are None. Raises ValueError for an unknown preset and for values of another kind."""
    check_choice("preset", preset, tuple(presets))
    for name, value in given.items():
        check_kind(name, value, presets[preset][name])
    return {name: presets[preset][name] if value is None else value for name, value in given.items()}


def check_kind(name: str, value: Any, like: Any) -> None:
    """Raises ValueError naming the option unless its value is of the kind of `like`: true or false, a whole number, or a finite number.

    Everything is of the kind of other values, and None, which stands for a default, of each.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number"}
    if value is None or type(like) not in kinds:
        return
    flag = isinstance(value, bool)
    fits = {
        bool: flag,
        int: not flag and isinstance(value, numbers.Integral),
        float: not flag and isinstance(value, numbers.Real) and math.isfinite(value),
    }
    if not fits[type(like)]:
        raise ValueError(f"{name} must be {kinds[type(like)]}; got {value!r}")


def level_scaled(rows: Tensor, weight: float, sizes: Sequence[Tensor]) -> Tensor:
    """`split_over_images` of weight / size times each level's sum of `rows` (L, N); 0 where a level's size, a scalar, is 0."""
    if not sizes:
        return rows
    return split_over_images(rows.sum(1) * quotient(weight, torch.stack(list(sizes)).to(rows.dtype)), rows)
