"""Losses that say what they are made of, so that several of them share the passes over the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.terms import Term
from ..pyramid import Gradients, Pyramid, as_pyramid, check_match
from ..reference.terms import VJP, Factor
from .base import ARGUMENTS, HEAD_NEEDS, DistillationLoss, TeacherLosses

Given = Mapping[str, Any]


class Reading(NamedTuple):
    """What a loss wants to know of the teacher's features.

    weights:     of its map, (N, C) a level or (N, C, H, W), None for a level without; None when it wants no map
    temperature: of its attention; None when it wants none
    """

    weights: list[Tensor | None] | None = None
    activation: str = "raw"
    rectify: str = "abs"
    temperature: float | None = None


class Read(NamedTuple):
    """The answer to a Reading: its weights again, maps (N, H, W), None where the weights are; attention S (N, H, W) and Ch (N, C)."""

    weights: list[Tensor | None] | None = None
    maps: list[Tensor | None] | None = None
    spatial: list[Tensor] | None = None
    channel: list[Tensor] | None = None


class Part(NamedTuple):
    """One term of a loss: `factor`, a number or a tensor that broadcasts to (L, N), times the term. Detached, it has no gradient."""

    term: Term
    factor: Factor
    detached: bool = False


class ComposedLoss(DistillationLoss):
    """A loss that is a sum of the library's terms.

    A method defines `reading`, what it reads of the teacher's features, `side`, what it keeps of the teacher, and `parts`, its terms.
    Several such losses are evaluated together by `teacher_sides` and `term_values`; one that overrides `teacher_side` or `terms` of this
    class is evaluated on its own.
    """

    def reading(self, features: list[Tensor], names: list[str], given: Given) -> Reading:
        """`features`: the teacher's, detached; `given`: the other arguments of `teacher_side` by name."""
        return Reading()

    def side(self, features: list[Tensor], names: list[str], read: Read, given: Given) -> Any:
        """The teacher's part of the loss, from what was read."""
        raise TypeError(f"{type(self).__name__} does not define side")

    def parts(self, student_features: Pyramid, side: Any, student_gradients: Gradients | None = None) -> dict[str, Part]:
        """Name of each term -> what it is. Raises ValueError where the student does not fit the teacher's side."""
        raise TypeError(f"{type(self).__name__} does not define parts")

    def shares(self) -> bool:
        """Whether it may be evaluated together with others."""
        return type(self).teacher_side is ComposedLoss.teacher_side and type(self).terms is ComposedLoss.terms

    def teacher_side(
        self,
        teacher_features: Pyramid,
        teacher_gradients: Gradients | None = None,
        boxes: Any = None,
        image_size: tuple[int, int] | None = None,
        teacher_losses: TeacherLosses | None = None,
    ) -> Any:
        given = {
            "teacher_gradients": teacher_gradients,
            "boxes": boxes,
            "image_size": image_size,
            "teacher_losses": teacher_losses,
        }
        with torch.no_grad():
            return _sides({"": self}, teacher_features, {"": given})[""]

    def terms(self, student_features: Pyramid, side: Any, student_gradients: Gradients | None = None) -> dict[str, Tensor]:
        return _values({"": self.parts(student_features, side, student_gradients)}, student_features)[""]


def teacher_sides(losses: Mapping[str, DistillationLoss], teacher_features: Pyramid, given: Mapping[str, Given]) -> dict[str, Any]:
    """`teacher_side` of every loss, reading the features as rarely as can be; `given`: each loss's other arguments by name."""
    with torch.no_grad():
        shared = {name: loss for name, loss in losses.items() if isinstance(loss, ComposedLoss) and loss.shares()}
        sides = _sides(shared, teacher_features, given)
        for name, loss in losses.items():
            if name not in sides:
                unused = {argument for need in HEAD_NEEDS - loss.needs for argument in ARGUMENTS[need]}
                mine = {key: x for key, x in given[name].items() if key not in unused}
                sides[name] = loss.teacher_side(teacher_features, **mine)
        return {name: sides[name] for name in losses}


def term_values(
    losses: Mapping[str, DistillationLoss],
    student_features: Pyramid,
    sides: Mapping[str, Any],
    student_gradients: Gradients | None,
    student_outputs: Any = None,
) -> dict[str, dict[str, Tensor]]:
    """`terms` of every loss, from common passes over the student's features. student_outputs: for those that need "outputs"."""
    shared, alone = split_shared(losses)
    found = _values({name: loss.parts(student_features, sides[name], student_gradients) for name, loss in shared.items()}, student_features)
    for name, loss in alone.items():
        outputs = {"student_outputs": student_outputs} if "outputs" in loss.needs else {}
        found[name] = loss.terms(student_features, sides[name], student_gradients, **outputs)
    return {name: found[name] for name in losses}


def term_values_vjp(
    losses: Mapping[str, ComposedLoss], student_features: Pyramid, sides: Mapping[str, Any], student_gradients: Gradients | None
) -> tuple[dict[str, dict[str, Tensor]], list[Tensor], VJP]:
    """`term_values` as a graph over the terms' own numbers (L, N), these numbers, which are leaves, and `ops.terms_vjp`'s function."""
    parts = {name: loss.parts(student_features, sides[name], student_gradients) for name, loss in losses.items()}
    rows, vjp = ops.terms_vjp(student_features, [(part.term, part.factor) for one in parts.values() for part in one.values()])
    leaves = [row.requires_grad_() for row in rows]
    left = iter(leaves)
    return {name: {term: _cut(next(left), part) for term, part in one.items()} for name, one in parts.items()}, leaves, vjp


def split_shared(losses: Mapping[str, DistillationLoss]) -> tuple[dict[str, ComposedLoss], dict[str, DistillationLoss]]:
    """Those that may be evaluated together, and those that may not."""
    shared = {name: loss for name, loss in losses.items() if isinstance(loss, ComposedLoss) and loss.shares()}
    return shared, {name: loss for name, loss in losses.items() if name not in shared}


def _values(parts: Mapping[str, Mapping[str, Part]], student_features: Pyramid) -> dict[str, dict[str, Tensor]]:
    """Loss -> name of the term -> (L, N)."""
    every = [(name, term, part) for name, one in parts.items() for term, part in one.items()]
    found: dict[str, dict[str, Tensor]] = {name: dict.fromkeys(one) for name, one in parts.items()}  # type: ignore[misc]
    levels, keys = as_pyramid("student_features", student_features)
    for detached in (False, True):
        chosen = [(name, term, part) for name, term, part in every if part.detached == detached]
        features = [x.detach() for x in levels] if detached else levels
        rows = ops.terms(dict(zip(keys, features, strict=True)), [(part.term, part.factor) for _, _, part in chosen]) if chosen else []
        for (name, term, _), row in zip(chosen, rows, strict=True):
            found[name][term] = row
    return found


def _cut(row: Tensor, part: Part) -> Tensor:
    return row.detach() if part.detached else row


def _sides(losses: Mapping[str, ComposedLoss], teacher_features: Pyramid, given: Mapping[str, Given]) -> dict[str, Any]:
    if not losses:
        return {}
    features, names = as_pyramid("teacher_features", teacher_features)
    features = [x.detach() for x in features]
    readings = {name: loss.reading(features, names, given[name]) for name, loss in losses.items()}
    reads = _read_together(features, list(readings.values()))
    return {name: loss.side(features, names, read, given[name]) for (name, loss), read in zip(losses.items(), reads, strict=True)}


def _read_together(features: list[Tensor], readings: list[Reading]) -> list[Read]:
    """The first map and the first attention from one pass; attention of the same temperature is made once."""
    attentions: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    maps: list[list[Tensor | None] | None] = []
    wanted = [r.temperature for r in readings if r.temperature is not None]
    for reading in readings:
        if reading.weights is None:
            maps.append(None)
        elif wanted and wanted[0] not in attentions and None not in reading.weights:
            weights = [w for w in reading.weights if w is not None]
            made, *attention = ops.shared_read(features, weights, reading.activation, reading.rectify, wanted[0])
            attentions[wanted[0]] = (attention[0], attention[1])
            maps.append(list(made))
        else:
            maps.append(maps_of(features, reading.weights, reading.activation, reading.rectify))
    reads = []
    for reading, made_maps in zip(readings, maps, strict=True):
        t = reading.temperature
        if t is not None and t not in attentions:
            attentions[t] = ops.attention(features, t)
        reads.append(Read(reading.weights, made_maps, *(attentions[t] if t is not None else (None, None))))
    return reads


def maps_of(features: Sequence[Tensor], weights: Sequence[Tensor | None], activation: str, rectify: str) -> list[Tensor | None]:
    """Maps (N, H, W) before normalisation, None where there are no weights."""
    keep = [i for i, w in enumerate(weights) if w is not None]
    made, _, _ = ops.weighted_channel_sum([features[i] for i in keep], [w for w in weights if w is not None], activation, rectify)
    maps: list[Tensor | None] = [None] * len(features)
    for i, r in zip(keep, made, strict=True):
        maps[i] = r
    return maps


def student_levels(
    student_features: Pyramid, names_t: list[str], teacher: Sequence[Any], axes: str = "NCHW"
) -> tuple[list[Tensor], list[str]]:
    """The student's levels and their names. Raises ValueError unless they agree with the teacher's tensors or shapes in these axes."""
    features, names = as_pyramid("student_features", student_features)
    check_match("student_features", features, names, "teacher_features", teacher, names_t, axes)
    return features, names
