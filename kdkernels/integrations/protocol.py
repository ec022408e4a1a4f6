"""What the Distiller has to know about a detector, and how it finds that out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from kdkernels.tap import unwrap


class TaskLosses(dict[str, Tensor]):
    """A detector's loss dict together with `outputs`: whatever its adapter needs to take the losses apart by image and level."""

    def __init__(self, losses: dict[str, Tensor], outputs: Any) -> None:
        super().__init__(losses)
        self.outputs = outputs


@runtime_checkable
class DetectorAdapter(Protocol):
    """What the library asks of a detector family.

    `images` and `targets` are either what the user gave to the Distiller or, for the teacher and for `frame`, what the
    student's own preprocessing made of it: the arguments or the result of the module that the optional attribute
    ``frame_module`` names (torchvision: "transform"). The optional attribute ``excluded_levels`` lists the levels that
    ``levels=None`` leaves out. Adapters that also have ``features(model, images)``, ``head_losses(model, images, features,
    targets)`` and ``detections(model, images, features)`` support pseudo ground truth and a teacher that stops at the neck.

    Losses on the outputs of a dense head ask for more: ``head_module``, its path; it is called with the list of its levels;
    ``head_outputs(model, images, seen)``, the `HeadOutputs` of the forward pass of which ``seen`` is the `HeadRecord`;
    ``watched(model, crosses)``, the submodules by name whose outputs that record shall keep besides; ``anchors(model, images,
    features)``, (A_l, 4) of each level; and for losses that cross heads ``cross(model, student, teacher, anchors)``, the
    `HeadOutputs` of the teacher's head on the student's head features.

    AID on a loss whose terms are weighed by different parts of the teacher's loss (LD) asks for ``per_image_parts(model, losses,
    per_level)``: what ``per_image_losses`` is the sum of, by the names "classification" and "regression".
    """

    default_tap: str

    def losses(self, model: nn.Module, images: Any, targets: Any) -> dict[str, Tensor]:
        """Differentiable task losses; L_det is the sum of all entries."""
        ...

    def frame(self, model: nn.Module, images: Any, targets: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Boxes (N, M, 4) xyxy and counts (N,) in pixels of the resized, padded batch that the features cover, and its (H, W)."""
        ...

    def per_image_losses(self, model: nn.Module, losses: dict[str, Tensor], per_level: bool) -> Tensor | None:
        """The losses that AID weighs by, taken apart: (N,), or (L, N) with `per_level`; None when the family cannot."""
        ...


def find_adapter(model: nn.Module) -> DetectorAdapter:
    """The adapter for the type of `model` (bare or wrapped). Raises TypeError that says how to pass one."""
    bare = unwrap(model)
    families: Sequence[type[Any]] = ()
    # A torchvision detector cannot exist where torchvision was not imported, and others must not need it.
    if any(kind.__module__.startswith("torchvision.") for kind in type(bare).__mro__):
        from kdkernels.integrations.torchvision import FAMILIES as families
    for family in families:
        if family.supports(bare):
            return family()
    raise TypeError(
        f"no adapter knows the detector type {type(bare).__name__}; pass adapter=, an object with losses(), frame(), per_image_losses() "
        "and default_tap (kdkernels.integrations.DetectorAdapter)"
    )
