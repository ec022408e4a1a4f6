"""What a detector's dense head says about a batch, in one form for all detector families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .pyramid import accumulate, level_shapes


class HeadOutputs(NamedTuple):
    """The outputs of a dense head, a tensor a level: of FCOS, RetinaNet and SSD their head, of Faster R-CNN its region proposal network.

    A_l is the number of anchors of level l (cells times anchors per cell), K the number of classes (1 for an RPN's objectness).

    classification: (N, A_l, K) logits of a sigmoid. SSD's head has a softmax over the classes and a background: of it, the log odds of
                    the classes, whose sigmoid is the softmax's probability, without the background
    regression:     (N, A_l, 4) as the head regresses
    anchors:        (A_l, 4) xyxy in pixels of the padded batch, the same for all images; of FCOS the cells' squares
    boxes:          (N, A_l, 4) the decoded boxes, xyxy in pixels
    distribution:   (N, A_l, 4, bins) logits of the regression's distribution, where the detector regresses by one
    """

    classification: list[Tensor]
    regression: list[Tensor]
    anchors: list[Tensor]
    boxes: list[Tensor]
    distribution: list[Tensor] | None = None


def levels_of(outputs: HeadOutputs, order: Sequence[int]) -> HeadOutputs:
    """The outputs of these levels."""
    return _changed(outputs, lambda levels: [levels[i] for i in order])


def detached(outputs: HeadOutputs) -> HeadOutputs:
    """The same outputs, without their graph."""
    return _changed(outputs, lambda levels: [x.detach() for x in levels])


def _changed(outputs: HeadOutputs, change: Callable[[list[Tensor]], list[Tensor]]) -> HeadOutputs:
    return HeadOutputs(*(None if levels is None else change(levels) for levels in outputs))  # type: ignore[arg-type]


def as_maps(levels: Sequence[Tensor]) -> list[Tensor]:
    """Levels (N, A, K) as the pyramid (N, K, A, 1) that the primitives take, channels_last where they are contiguous."""
    return [x.transpose(1, 2).unsqueeze(3) for x in levels]


def best_scores(outputs: HeadOutputs) -> list[Tensor]:
    """max_k sigma of every anchor, (N, A_l) a level, in fp32 (fp64 for fp64), detached."""
    return [accumulate(x.detach().amax(2)).sigmoid() for x in outputs.classification]


def check_outputs(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises ValueError, naming both sides' shapes, unless all levels of these parts of two heads' outputs have the same shapes."""
    if [x.shape for x in student] != [x.shape for x in teacher]:
        shapes = f"student_outputs have {level_shapes(student)}, teacher_outputs {level_shapes(teacher)}"
        raise ValueError(f"{what} do not fit: {shapes}; both need heads of one kind")


def check_levels(
    outputs: HeadOutputs,
    features: Sequence[Tensor],
    names: Sequence[str],
    needed: Sequence[str] = ("classification", "anchors"),
    cells: bool = False,
) -> None:
    """Raises ValueError, naming part and level, unless the teacher's outputs have the features' images and levels, and anchors for all.

    names: of the features' levels;   needed: the parts that must not be missing, the others may be empty;   cells: every cell of a level
    has the same number of anchors, at least one
    """
    of_features = f"teacher_features are {level_shapes(features, names)}"
    for part, levels in zip(HeadOutputs._fields, outputs, strict=True):
        if len(levels or ()) != len(features) and (levels or part in needed):
            raise ValueError(f"teacher_outputs: {part} has {len(levels or ())} levels, wanted {len(features)}: {of_features}")
    for level, (x, name) in enumerate(zip(features, names, strict=True)):
        classes = tuple(outputs.classification[level].shape)
        images, each = x.shape[0], x.shape[2] * x.shape[3]
        if len(classes) != 3 or classes[0] != images or classes[2] < 1:
            raise _unfit("classification", name, classes, f"({images}, A, K), K at least 1: {of_features}")
        count = classes[1]
        if cells and (count < 1 or count % each):
            raise _unfit("classification", name, classes, f"({images}, A, K), A a multiple of {x.shape[2]} * {x.shape[3]}: {of_features}")
        wanted = {"regression": (images, count, 4), "anchors": (count, 4), "boxes": (images, count, 4), "distribution": (images, count, 4)}
        for part, shape in wanted.items():
            levels = getattr(outputs, part)
            got = tuple(levels[level].shape) if levels else None
            if got is not None and (got[:-1] if part == "distribution" else got) != shape:
                bins = " and bins" if part == "distribution" else ""
                raise _unfit(part, name, got, f"{shape}{bins}: classification has {classes}, {of_features}")


def _unfit(part: str, name: str, got: Sequence[int], wanted: str) -> ValueError:
    return ValueError(f"teacher_outputs, level {name}: {part} has shape {tuple(got)}, wanted {wanted}")
