"""FRS against its formula."""

from __future__ import annotations

import pytest
import torch
from oracle import cases, frs
from oracle.tape import Evaluation
from oracle_heads import head, lists, outputs
from oracle_support import SHAPES, anchors, check_terms, features, kinds, narrower, parameters_of, preset_loss, presets, randomised

# methods.md 6.9: GFL, RetinaNet, FCOS, and Faster R-CNN by its RPN's objectness.
PUBLISHED = {
    "one-stage": {"alpha": 0.1, "beta": 0.05},
    "gfl": {"alpha": 0.1, "beta": 0.05},
    "retinanet": {"alpha": 0.005, "beta": 0.02},
    "fcos": {"alpha": 0.01, "beta": 0.05},
    "two-stage": {"alpha": 0.002, "beta": 0.1},
}


def test_published_defaults():
    assert presets("frs", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, channels):
    s, t = features(18, dtype, narrower(SHAPES, channels))
    of_student, of_teacher = head(1, dtype), head(2, dtype)
    x, y = cases.tensors(s, dtype, requires_grad=True), cases.tensors(t, dtype)
    student = outputs(of_student, dtype, anchors(), ["classes"])
    loss = preset_loss("frs", preset).build(x, y)
    module = randomised(loss.trainable.to(dtype))
    found = loss.terms(x, loss.teacher_side(y, teacher_outputs=outputs(of_teacher, dtype, anchors())), student_outputs=student)

    def oracle(levels, logits, parameters):
        teacher = [level.tolist() for level in t]
        return frs.terms(levels, teacher, logits, lists(of_teacher)["classes"], parameters, **PUBLISHED[preset])

    want = Evaluation(oracle, s, of_student["classes"], parameters_of(module))
    assert check_terms(found, want, [x, student.classification], module) == {"feature", "classification"}


def test_one_anchor_a_cell_and_one_class():
    shapes = [(2, 3, 4, 3), (2, 3, 1, 1)]
    own = [level[::2] for level in anchors(shapes)]
    s, t = features(19, torch.float64, shapes, shapes)
    of_student, of_teacher = head(3, torch.float64, shapes, own=own), head(4, torch.float64, shapes, own=own)
    for one in (of_student, of_teacher):
        one["classes"] = [level[:, :, :1] for level in one["classes"]]
    x, y = cases.tensors(s, requires_grad=True), cases.tensors(t)
    student = outputs(of_student, torch.float64, own, ["classes"])
    loss = preset_loss("frs", "two-stage").build(x, y)
    module = randomised(loss.trainable.double())
    found = loss.terms(x, loss.teacher_side(y, teacher_outputs=outputs(of_teacher, torch.float64, own)), student_outputs=student)

    def oracle(levels, logits, parameters):
        return frs.terms(
            levels, [level.tolist() for level in t], logits, lists(of_teacher)["classes"], parameters, **PUBLISHED["two-stage"]
        )

    want = Evaluation(oracle, s, of_student["classes"], parameters_of(module))
    assert check_terms(found, want, [x, student.classification], module) == {"feature", "classification"}
