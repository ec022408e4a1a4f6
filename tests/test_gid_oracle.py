"""GID against its formula, with RoIAlign, suppression and matching box by box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import cases, gid
from oracle.tape import Evaluation
from oracle_heads import Head, head, lists, outputs
from oracle_support import check_terms, features, kinds, preset_loss, presets

# methods.md 6.4: the configuration's numbers.
PUBLISHED = {
    "one-stage": {"feature": 5e-4, "relation": 40.0, "classification": 0.1, "regression": 1.0},
    "two-stage": {"feature": 5e-4, "relation": 40.0, "classification": 0.1, "regression": 1.0},
}
TERMS = {"feature", "relation", "classification", "regression"}
STRIDES = [8.0, 16.0]
SHAPES = [(2, 2, 5, 7), (2, 2, 3, 4)]


def _anchors() -> list[np.ndarray]:
    """Squares, small on the first level, and on the second so large that their boxes belong to it."""
    levels = []
    for stride, side, (_, _, height, width) in zip(STRIDES, (22.0, 250.0), SHAPES, strict=True):
        x, y = np.meshgrid((np.arange(width) + 0.5) * stride, (np.arange(height) + 0.5) * stride)
        centre = np.stack([x.ravel(), y.ravel()], 1)
        levels.append(np.concatenate([centre - side / 2, centre + side / 2], 1))
    return levels


OWN = _anchors()


def _joined(parts: dict[str, list]) -> dict[str, list]:
    """The anchors of all levels one after another, of each image."""
    return {part: [sum(levels, []) for levels in zip(*by_level, strict=True)] for part, by_level in parts.items()}


def _heads(seed: int, dtype: torch.dtype) -> tuple[Head, Head]:
    return tuple(head(seed + k, dtype, SHAPES, own=OWN) for k in range(2))


def _compared(loss, options, levels, heads, dtype) -> set[str]:
    (s, t), (of_student, of_teacher) = levels, heads
    x, y = cases.tensors(s, dtype, requires_grad=True), cases.tensors(t, dtype)
    student = outputs(of_student, dtype, OWN, ["classes", "deltas"])
    found = loss.terms(x, loss.teacher_side(y, teacher_outputs=outputs(of_teacher, dtype, OWN)), student_outputs=student)

    def oracle(features_, classes, deltas):
        crossed = _joined({"classes": classes, "deltas": deltas, "boxes": lists(of_student)["boxes"]})
        anchors = [anchor for level in OWN for anchor in level.tolist()]
        return gid.terms(features_, [level.tolist() for level in t], crossed, _joined(lists(of_teacher)), anchors, STRIDES, **options)

    want = Evaluation(oracle, s, of_student["classes"], of_student["deltas"])
    return check_terms(found, want, [x, student.classification, student.regression])


def test_published_defaults():
    assert presets("gid", PUBLISHED) == PUBLISHED


def test_the_instances_are_of_both_levels_and_some_anchors_are_near():
    of_student, of_teacher = (_joined(lists(one)) for one in _heads(30, torch.float64))
    anchors = [anchor for level in OWN for anchor in level.tolist()]
    chosen = [
        gid.instances(of_student["classes"][n], of_teacher["classes"][n], of_student["boxes"][n], of_teacher["boxes"][n]) for n in range(2)
    ]
    assert {gid.level_of(box, STRIDES) for boxes in chosen for box in boxes} == {0, 1}
    assert all(3 <= len(boxes) <= 10 for boxes in chosen)
    assert all(any(gid.iou(anchor, box) >= 0.5 for anchor in anchors for box in boxes) for boxes in chosen)


@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype):
    assert _compared(preset_loss("gid", preset), PUBLISHED[preset], features(24, dtype, SHAPES, SHAPES), _heads(30, dtype), dtype) == TERMS


def test_two_instances_have_no_relation():
    levels = [[level[:1] for level in side] for side in features(25, torch.float64, SHAPES, SHAPES)]
    heads = [{part: [level[:1].copy() for level in found] for part, found in one.items()} for one in _heads(32, torch.float64)]
    for one in heads:
        # Two places for all boxes.
        for level, corner in zip(one["boxes"], (3.0, 33.0), strict=True):
            level[:] = np.array([corner, corner, corner + 20.0, corner + 15.0])
    assert _compared(preset_loss("gid", "one-stage"), PUBLISHED["one-stage"], levels, heads, torch.float64) == TERMS
