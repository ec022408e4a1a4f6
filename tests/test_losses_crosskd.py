"""CrossKDLoss: boxes or distributions, and what its terms divide by."""

from __future__ import annotations

import torch
from oracle.compare import RTOL64, assert_close
from oracle.overlap import giou
from outputs_support import features, head_outputs, targets

from kdkernels import CrossKDLoss
from kdkernels.losses.assignment import assign, generalized_overlap


def _terms(loss, student, teacher, boxes):
    side = loss.teacher_side(features(2), boxes=boxes, image_size=(48, 64), teacher_outputs=teacher)
    return loss.terms(features(1), side, student_outputs=student)


def test_generalized_overlap_is_that_of_the_loops():
    a, b = (head_outputs(seed).boxes[0][0] for seed in (1, 2))
    assert_close(generalized_overlap(a, b), [giou(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)], RTOL64)
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    value = generalized_overlap(point, torch.tensor([[3.0, 3.0, 3.0, 3.0]]))
    assert value.item() == 0 and torch.autograd.grad(value.sum(), point)[0].isfinite().all()
    apart = generalized_overlap(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[9.0, 0.0, 10.0, 1.0]]))
    assert_close(apart, [-0.8], 1e-6)


def test_boxes_are_compared_where_one_head_has_no_distribution():
    student, teacher = head_outputs(3), head_outputs(4)
    boxes = targets()
    both = _terms(CrossKDLoss(), student, teacher, boxes)
    one = _terms(CrossKDLoss(), student._replace(distribution=None), teacher, boxes)
    assert list(both) == ["classification", "distribution"] and list(one) == ["classification", "regression"]
    assert torch.equal(both["classification"], one["classification"])
    positives = sum(max(1, int(sum(level[n].sum() for level in assign(teacher.anchors, boxes).positive))) for n in range(2))
    weight = [x.amax(2).sigmoid() for x in teacher.classification]
    parts = [(w * (1 - generalized_overlap(a, b))).sum(1) for w, a, b in zip(weight, student.boxes, teacher.boxes, strict=True)]
    assert_close(one["regression"], torch.stack(parts) / positives, RTOL64)
    edges = zip(student.distribution, teacher.distribution, strict=True)
    apart = [(q.softmax(3) * (q.log_softmax(3) - p.log_softmax(3))).sum((2, 3)) for p, q in edges]
    rows = torch.stack([(w * x).sum(1) for w, x in zip(weight, apart, strict=True)])
    assert_close(both["distribution"], rows / sum(w.sum() for w in weight), RTOL64)


def test_an_image_without_boxes_counts_as_one_positive():
    student, teacher = head_outputs(3), head_outputs(4)
    boxes = targets()
    nothing = [torch.zeros(0, 4, dtype=torch.float64)] * 2
    some = _terms(CrossKDLoss(), student, teacher, boxes)["classification"]
    none = _terms(CrossKDLoss(), student, teacher, nothing)["classification"]
    positives = sum(max(1, int(sum(level[n].sum() for level in assign(teacher.anchors, boxes).positive))) for n in range(2))
    assert positives > 2
    assert_close(some * positives, none * 2, RTOL64)


def test_a_student_that_says_the_same_has_nothing_to_learn():
    teacher = head_outputs(4)
    student = head_outputs(4, requires_grad=True)
    terms = _terms(CrossKDLoss(), student, teacher, targets())
    assert all(float(value.detach().abs().max()) < 1e-12 for value in terms.values())
    found = torch.autograd.grad(sum(value.sum() for value in terms.values()), student.classification)
    assert all(g.abs().max() == 0 for g in found)
