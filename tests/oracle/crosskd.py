"""CrossKD (methods.md 6.11): the teacher's head on the student's head features (crossed) against the teacher's own answers."""

from __future__ import annotations

from .atss import Boxes, positives
from .logits import best_probability, divergence, focal
from .overlap import giou
from .tape import Number, Rows, split, total


def terms(
    crossed: dict[str, list],
    teacher: dict[str, list],
    anchors: list[Boxes],
    boxes: list[Boxes],
    classification: float = 1.0,
    regression: float = 1.0,
    distribution: float = 4.0,
) -> dict[str, Rows]:
    """classes (N, A, K), and boxes (N, A, 4) or bins (N, A, 4, bins), a level each.

    The classes and GIoU are divided by the positives of the batch, an image counting at least one, as in the released code, whose GFL
    assigns by ATSS; the distributions by 4 and by the weights of all levels.
    """
    chosen = [positives(anchors, own) for own in boxes]
    count = float(sum(max(1, sum(sum(level) for level in image)) for image in chosen))
    levels, images = range(len(anchors)), range(len(boxes))
    weights = [[[best_probability(one) for one in teacher["classes"][k][n]] for n in images] for k in levels]
    answers: list[list[Number]] = []
    places: list[list[Number]] = []
    for k in levels:
        answer, place = [], []
        for n in images:
            pairs = zip(crossed["classes"][k][n], teacher["classes"][k][n], strict=True)
            answer.append(total([focal(a, b, 1.0) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]))
            parts = []
            for i, weight in enumerate(weights[k][n]):
                if "bins" in teacher:
                    edges = zip(teacher["bins"][k][n][i], crossed["bins"][k][n][i], strict=True)
                    parts += [divergence(a, b) * weight for a, b in edges]
                else:
                    parts.append((1.0 - giou(crossed["boxes"][k][n][i], teacher["boxes"][k][n][i])) * weight)
            place.append(total(parts))
        answers.append(answer)
        places.append(place)
    found = {"classification": split([total(row) * (classification / count) for row in answers], answers)}
    if "bins" in teacher:
        whole = 4.0 * sum(weight for level in weights for image in level for weight in image)
        found["distribution"] = split([total(row) * (distribution / whole) for row in places], places)
    else:
        found["regression"] = split([total(row) * (regression / count) for row in places], places)
    return found
