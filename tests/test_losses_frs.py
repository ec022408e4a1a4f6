"""FRSLoss: its mask, several anchors a cell, students of other channels and sizes, and what its terms divide by."""

from __future__ import annotations

import pytest
import torch
from losses_support import built
from oracle.compare import RTOL64, assert_close
from outputs_support import SIZES, features, head_outputs

from kdkernels import FRSLoss
from kdkernels.outputs import HeadOutputs


def _terms(loss, s, t, student, teacher):
    return loss.terms(s, loss.teacher_side(t, teacher_outputs=teacher), student_outputs=student)


@pytest.mark.parametrize("per_cell", [1, 3])
def test_mask_is_the_best_score_of_the_cell(per_cell):
    s, t = features(1), features(2)
    student, teacher = (head_outputs(seed, per_cell=per_cell) for seed in (3, 4))
    loss = built(FRSLoss(), s, t)
    terms = _terms(loss, s, t, student, teacher)
    assert all((terms[name] > 0).all() for name in ("feature", "classification"))
    aligned = loss.trainable(s, t)
    for level, size in enumerate(SIZES):
        best = teacher.classification[level].sigmoid().amax(2).view(2, *size, per_cell).amax(3)
        feature = (best[:, None] * (aligned[level] - t[level]).square()).sum((1, 2, 3))
        assert_close(terms["feature"][level], 0.1 * feature.detach() / best.sum(), RTOL64)
        each = best.flatten(1).repeat_interleave(per_cell, 1)
        p, target = student.classification[level], teacher.classification[level].sigmoid()
        error = torch.nn.functional.binary_cross_entropy_with_logits(p, target, reduction="none").sum(2)
        assert_close(terms["classification"][level], 0.05 * (each * error).sum(1) / best.sum(), RTOL64)


def test_student_of_other_channels_and_sizes():
    s, t = features(1, [(5, 7), (3, 3)], channels=6), features(2)
    s = [x.requires_grad_() for x in s]
    loss = built(FRSLoss(reduction="none"), s, t)
    value = loss(s, t, head_outputs(3), head_outputs(4))
    assert value.shape == (2, 2) and value.isfinite().all()
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(value.sum(), [*s, *loss.trainable.parameters()]))


def test_a_teacher_that_sees_nothing_teaches_nothing():
    s, t = features(1), features(2)
    teacher = head_outputs(4)
    teacher = teacher._replace(classification=[torch.full_like(x, -1000.0) for x in teacher.classification])
    student = head_outputs(3, requires_grad=True)
    value = built(FRSLoss(), s, t)(s, t, student, teacher)
    assert value.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(value, student.classification))


def test_outputs_of_other_levels_are_refused():
    s, t = features(1), features(2)
    for sizes, count in (((5, 7), 35), ((0, 8), 0)):
        given = [head_outputs(seed, [sizes, (3, 4)]) for seed in (3, 4)]
        said = rf"teacher_outputs, level 0: classification has shape \(2, {count}, 3\), wanted \(2, A, K\), A a multiple of 6 \* 8"
        with pytest.raises(ValueError, match=said):
            FRSLoss()(s, t, *given)
    with pytest.raises(ValueError, match=r"classification has 1 levels, wanted 2: teacher_features are \[0: \(2, 4, 6, 8\)"):
        FRSLoss()(s, t, head_outputs(3, SIZES[:1], (8,)), head_outputs(4, SIZES[:1], (8,)))


def test_of_the_outputs_the_classification_is_enough():
    s, t = features(1), features(2)
    student, teacher = ((head_outputs(seed), HeadOutputs(head_outputs(seed).classification, [], [], [])) for seed in (3, 4))
    loss = built(FRSLoss(), s, t)
    assert torch.equal(loss(s, t, student[1], teacher[1]), loss(s, t, student[0], teacher[0]))
