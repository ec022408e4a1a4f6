"""LD against its formula: positives and valuable localisation region too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import aid, atss, cases, ld
from oracle.compare import RTOL_MASK
from oracle.tape import Evaluation
from oracle_heads import head, lists, outputs
from oracle_support import BOXES, IMAGE_SIZE, RTOLS, anchors, check_terms, features, kinds, preset_loss, presets

from kdkernels import AIDLoss

# methods.md 6.10: COCO configurations of LD; the AID repository's for KITTI, without the region.
PUBLISHED = {
    "one-stage": {"ld": 0.25, "vlr": 0.25, "kd": 10.0, "temperature": 10.0, "class_temperature": 2.0},
    "two-stage": {"ld": 0.25, "vlr": 0.25, "kd": 10.0, "temperature": 10.0, "class_temperature": 2.0},
    "ld-kitti": {"ld": 0.05, "vlr": 0.0, "kd": 0.05, "temperature": 10.0, "class_temperature": 2.0},
}
TERMS = {"localization", "region", "classification"}

OWN = anchors()
# Of the teacher, by level and image.
LOSSES = {"classification": np.array([[0.1, 2.0, 1.0], [0.5, 0.0, 0.25], [3.0, 1.25, 2.0]]), "regression": np.arange(9.0).reshape(3, 3) / 4}


def test_published_defaults():
    assert presets("ld", PUBLISHED) == PUBLISHED


def test_the_boxes_have_positives_and_a_region():
    own = [level.tolist() for level in OWN]
    for boxes in BOXES:
        chosen = sum(map(sum, atss.positives(own, boxes.tolist())))
        valued = sum(value > 0 for level in atss.region(own, boxes.tolist()) for value in level)
        assert (chosen > 0, valued > 0) == (len(boxes) > 0,) * 2


@pytest.mark.parametrize("frames", [BOXES, [BOXES[2]] * 3], ids=["boxes", "no boxes"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, frames):
    of_student, of_teacher = head(5, dtype, distribution=True, own=OWN), head(6, dtype, distribution=True, own=OWN)
    student = outputs(of_student, dtype, OWN, ["classes", "bins"])
    levels = [cases.tensors(side, dtype) for side in features(20, dtype)]
    given = {"boxes": cases.box_tensors(frames), "image_size": IMAGE_SIZE, "teacher_outputs": outputs(of_teacher, dtype, OWN)}
    loss = preset_loss("ld", preset)
    found = loss.terms(levels[0], loss.teacher_side(levels[1], **given), student_outputs=student)
    where, boxes, teacher = [level.tolist() for level in OWN], [one.tolist() for one in frames], lists(of_teacher)

    def oracle(classes, bins):
        return ld.terms(classes, bins, teacher["classes"], teacher["bins"], where, boxes, **PUBLISHED[preset])

    want = Evaluation(oracle, of_student["classes"], of_student["bins"])
    assert any(np.any(want.value(term)) for term in TERMS) == any(len(one) for one in frames)
    # The overlaps, which weigh the region, are fp32.
    rtol = max(RTOL_MASK, RTOLS[dtype])
    assert check_terms(found, want, [student.classification, student.distribution], rtol=rtol) == TERMS


@pytest.mark.parametrize("granularity", ["image", "level", "level x image", "batch"])
def test_aid_weighs_place_and_class_by_the_teachers_own_loss_of_each(granularity):
    of_student, of_teacher = head(5, torch.float64, distribution=True, own=OWN), head(6, torch.float64, distribution=True, own=OWN)
    student = outputs(of_student, torch.float64, OWN, ["classes", "bins"])
    levels = [cases.tensors(side) for side in features(20, torch.float64)]
    given = {"boxes": cases.box_tensors(BOXES), "image_size": IMAGE_SIZE, "teacher_outputs": outputs(of_teacher, torch.float64, OWN)}
    loss = AIDLoss(preset_loss("ld", "one-stage"), granularity=granularity)
    side = loss.teacher_side(levels[1], teacher_losses={part: torch.tensor(t) for part, t in LOSSES.items()}, **given)
    where, boxes, teacher = [level.tolist() for level in OWN], [one.tolist() for one in BOXES], lists(of_teacher)
    parts = {"localization": "regression", "region": "regression", "classification": "classification"}

    def oracle(classes, bins):
        found = ld.terms(classes, bins, teacher["classes"], teacher["bins"], where, boxes, **PUBLISHED["one-stage"])
        weights = {term: aid.weights(LOSSES[part], granularity, 3, 3).tolist() for term, part in parts.items()}
        return {
            term: [[x * w for x, w in zip(row, by, strict=True)] for row, by in zip(rows, weights[term], strict=True)]
            for term, rows in found.items()
        }

    want = Evaluation(oracle, of_student["classes"], of_student["bins"])
    found = loss.terms(levels[0], side, student_outputs=student)
    assert check_terms(found, want, [student.classification, student.distribution], rtol=RTOL_MASK) == TERMS
