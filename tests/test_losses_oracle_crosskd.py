"""CrossKD's loss of the crossed outputs against its formula."""

from __future__ import annotations

import pytest
from oracle import cases, crosskd
from oracle.compare import RTOL_MASK
from oracle.tape import Evaluation
from oracle_heads import head, lists, outputs, parts_of
from oracle_support import BOXES, IMAGE_SIZE, RTOLS, anchors, check_terms, features, kinds, preset_loss, presets

# methods.md 6.11: 1 for the classes, 4 for the distributions, 1 for GIoU.
PUBLISHED = {
    "one-stage": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
    "two-stage": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
    "gfl": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
    "retinanet": {"classification": 1.0, "regression": 1.0, "distribution": 4.0},
    "fcos": {"classification": 0.4, "regression": 0.75, "distribution": 4.0},
}

OWN = anchors()


def test_published_defaults():
    assert presets("crosskd", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("part", ["boxes", "bins"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, part):
    of_student, of_teacher = (head(seed, dtype, distribution=part == "bins", own=OWN) for seed in (7, 8))
    student = outputs(of_student, dtype, OWN, ["classes", part])
    levels = [cases.tensors(side, dtype) for side in features(21, dtype)]
    given = {"boxes": cases.box_tensors(BOXES), "image_size": IMAGE_SIZE, "teacher_outputs": outputs(of_teacher, dtype, OWN)}
    loss = preset_loss("crosskd", preset)
    found = loss.terms(levels[0], loss.teacher_side(levels[1], **given), student_outputs=student)
    where, boxes, teacher = [level.tolist() for level in OWN], [one.tolist() for one in BOXES], lists(of_teacher)

    def oracle(classes, places):
        crossed = {"classes": classes, part: places}
        return crosskd.terms(crossed, {"classes": teacher["classes"], part: teacher[part]}, where, boxes, **PUBLISHED[preset])

    want = Evaluation(oracle, of_student["classes"], of_student[part])
    inputs = [student.classification, parts_of(student)[part]]
    wanted = {"classification", "distribution" if part == "bins" else "regression"}
    assert check_terms(found, want, inputs, rtol=max(RTOL_MASK, RTOLS[dtype])) == wanted
