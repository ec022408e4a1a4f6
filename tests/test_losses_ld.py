"""LDLoss: which anchors it distils at, what its terms divide by, and a detector that regresses plain numbers."""

from __future__ import annotations

import pytest
import torch
from oracle import atss
from oracle.compare import RTOL64, assert_close
from outputs_support import SIZES, STRIDES, features, grid_anchors, head_outputs, targets

from kdkernels import LDLoss
from kdkernels.losses.assignment import assign

ARGUMENTS = {"boxes": targets(), "image_size": (48, 64)}


def _terms(loss, student, teacher, boxes=None):
    s, t = features(1), features(2)
    side = loss.teacher_side(t, boxes=boxes or targets(), image_size=(48, 64), teacher_outputs=teacher)
    return loss.terms(s, side, student_outputs=student)


@pytest.mark.parametrize("per_cell", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_assignment_is_that_of_the_loops(per_cell, seed):
    anchors = [grid_anchors(size, stride, per_cell) for size, stride in zip(SIZES, STRIDES, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(6, 2, generator=generator, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + 4 + torch.rand(6, 2, generator=generator, dtype=torch.float64) * 30], 1)
    found = assign(anchors, [boxes[:4], boxes[4:], boxes[:0]])
    for n, own in enumerate((boxes[:4], boxes[4:], boxes[:0])):
        listed = [level.tolist() for level in anchors]
        positive, region = atss.positives(listed, own.tolist()), atss.region(listed, own.tolist())
        for level in range(2):
            assert found.positive[level][n].tolist() == positive[level]
            assert_close(found.region[level][n], region[level], RTOL64)
    assert any(level.any() for level in found.positive) and all(level[2].sum() == 0 for level in found.positive)


def test_of_equally_near_anchors_the_first_are_candidates():
    # Nine anchors of one cell among many of equal distance: centre of four cells.
    anchors = [grid_anchors((4, 4), 8.0, 9)]
    box = torch.tensor([[2.0, 2.0, 22.0, 22.0]], dtype=torch.float64)
    got = assign(anchors, [box]).positive[0][0]
    assert got.tolist() == atss.positives([anchors[0].tolist()], box.tolist())[0]
    single = assign([anchors[0][40:41]], [box])
    assert single.positive[0].shape == (1, 1) and single.region[0].isfinite().all()


def test_localization_is_separable_and_the_score_a_constant():
    student, teacher = head_outputs(3, requires_grad=True), head_outputs(4)
    both = _terms(LDLoss(), student, teacher)
    gradient = torch.autograd.grad(both["localization"].sum(), student.classification[0], allow_unused=True)[0]
    assert gradient is None
    with torch.no_grad():
        for part in (student.distribution, student.classification):
            part[0][1] *= 1.5
    moved = _terms(LDLoss(), student, teacher)
    for term in ("localization", "region"):
        assert torch.equal(both[term][:, 0], moved[term][:, 0])
        assert not torch.equal(both[term][0, 1], moved[term][0, 1]) or both[term][0, 1] == 0
    assert both["region"][0, 1] > 0


def test_classes_are_a_mean_over_the_levels_positives():
    student, teacher = head_outputs(3), head_outputs(4)
    terms = _terms(LDLoss(kd=1.0), student, teacher)
    found = assign(teacher.anchors, targets())
    for level in range(2):
        chosen = found.positive[level]
        if chosen.any():
            q, p = ((o.classification[level][chosen] / 2).log_softmax(1) for o in (teacher, student))
            want = 4 * (q.exp() * (q - p)).mean(1).mean()
            assert_close(terms["classification"][level].sum(), want, RTOL64)
        else:
            assert terms["classification"][level].abs().sum() == 0
    assert any(chosen.any() for chosen in found.positive)


def test_plain_numbers_are_refused():
    student, plain = head_outputs(3), head_outputs(4, bins=None)
    with pytest.raises(ValueError, match=r"the teacher's head regresses plain numbers.*reg_max"):
        LDLoss()(features(1), features(2), student, plain, **ARGUMENTS)
    with pytest.raises(ValueError, match=r"the student's head regresses plain numbers"):
        LDLoss()(features(1), features(2), plain, student, **ARGUMENTS)
    with pytest.raises(ValueError, match="distributions do not fit"):
        LDLoss()(features(1), features(2), head_outputs(3, bins=6), student, **ARGUMENTS)
    with pytest.raises(ValueError, match="temperatures must be above 0; got 0"):
        LDLoss(temperature=0.0)
