"""GID (methods.md 6.4): general instances where the two networks differ, compared by features, relations and answers."""

from __future__ import annotations

import math

from .layers import Level
from .logits import focal
from .overlap import area, iou
from .roi_align import roi_align
from .tape import Number, Rows, constant, mean, root, sigmoid, square, total

Boxes = list[list[float]]


def instances(classes_s: list, classes_t: list, boxes_s: Boxes, boxes_t: Boxes, before: int = 3000, after: int = 10) -> Boxes:
    """GI boxes of one image from the anchors of all levels: logits (A, K), boxes (A, 4)."""
    scored = []
    for logits_s, logits_t, box_s, box_t in zip(classes_s, classes_t, boxes_s, boxes_t, strict=True):
        of_student, of_teacher = [sigmoid(constant(x)) for x in logits_s], [sigmoid(constant(x)) for x in logits_t]
        score = max(abs(a - b) for a, b in zip(of_student, of_teacher, strict=True))
        chosen = box_t if max(of_teacher) > max(of_student) else box_s
        scored.append((score, [constant(value) for value in chosen]))
    scored.sort(key=lambda pair: -pair[0])
    kept: Boxes = []
    for _, box in scored[:before]:
        if all(iou(box, other) <= 0.3 for other in kept):
            kept.append(box)
    return kept[:after]


def level_of(box: list[float], strides: list[float]) -> int:
    """The FPN level floor(4 + log2(sqrt(area) / 224)), clamped to those given."""
    first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    return min(max(math.floor(4 + math.log2(math.sqrt(area(box)) / 224)), first), last) - first


def _distances(regions: list[list[Number]]) -> list[Number]:
    """d_ij / mean d of the pairs i != j."""
    found = []
    for i, a in enumerate(regions):
        for j, b in enumerate(regions):
            if i != j:
                found.append(root(total([square(x - y) for x, y in zip(a, b, strict=True)])))
    middle = mean(found)
    return [d / middle for d in found]


def _smooth(d: Number) -> Number:
    return square(d) * 0.5 if abs(constant(d)) < 1.0 else abs(d) - 0.5


def _shared(whole: Number, parts: list[Number]) -> list[Number]:
    norm = math.fsum(constant(part) for part in parts)
    return [whole * (constant(part) / norm if norm else 1.0 / len(parts)) for part in parts]


def terms(
    s: list[Level],
    t: list[Level],
    student: dict[str, list],
    teacher: dict[str, list],
    anchors: Boxes,
    strides: list[float],
    feature: float = 5e-4,
    relation: float = 40.0,
    classification: float = 0.1,
    regression: float = 1.0,
) -> dict[str, Rows]:
    """student, teacher: "classes" (N, A, K), "deltas" and "boxes" (N, A, 4), for the anchors (A, 4) of all levels one after another."""
    images = range(len(t[0]))
    chosen = [instances(student["classes"][n], teacher["classes"][n], student["boxes"][n], teacher["boxes"][n]) for n in images]
    of_student, of_teacher, owners = [], [], []
    for n in images:
        for box in chosen[n]:
            level = level_of(box, strides)
            of_student.append(roi_align(s[level][n], box, 1.0 / strides[level]))
            of_teacher.append(roi_align(t[level][n], box, 1.0 / strides[level]))
            owners.append(n)
    count = len(owners)
    own: list[list[Number]] = [[] for _ in images]
    for n, a, b in zip(owners, of_student, of_teacher, strict=True):
        own[n].append(total([square(x - y) for x, y in zip(a, b, strict=True)]))
    sums = [total(parts) for parts in own]
    found = {"feature": [_shared(total(sums) * (feature / (count * 100)), sums)]}
    related: Number = 0.0
    if count >= 3:
        apart = [a - b for a, b in zip(_distances(of_student), _distances(of_teacher), strict=True)]
        related = mean([_smooth(d) for d in apart]) * relation
    found["relation"] = [[related / len(images) for _ in images]]
    answers: dict[str, list[list[Number]]] = {"classification": [[] for _ in images], "regression": [[] for _ in images]}
    matched = 0
    for n in images:
        for i, anchor in enumerate(anchors):
            if any(iou(anchor, box) >= 0.5 for box in chosen[n]):
                matched += 1
                logits = zip(student["classes"][n][i], teacher["classes"][n][i], strict=True)
                answers["classification"][n] += [focal(a, constant(b), 0.0) for a, b in logits]
                deltas = zip(student["deltas"][n][i], teacher["deltas"][n][i], strict=True)
                answers["regression"][n] += [abs(a - constant(b)) for a, b in deltas]
    for term, coefficient in (("classification", classification), ("regression", regression)):
        sums = [total(parts) for parts in answers[term]]
        # The released code sums the classes and the box's sides of an anchor, and averages over the anchors.
        found[term] = [_shared(total(sums) * (coefficient / max(1, matched)), sums)]
    return found
