"""GIDLoss (needs torchvision): its instances, levels, relations and answers, against the loops, and what it refuses."""

from __future__ import annotations

import sys

import pytest
import torch
from oracle import gid as loops
from oracle.compare import RTOL64, assert_close
from outputs_support import features, head_outputs, leaves, moved

from kdkernels import AIDLoss, FusedLoss, GIDLoss, PADLoss, functional
from kdkernels.losses.gid import anchor_strides, distances, general_instances
from kdkernels.outputs import levels_of


def case(images=2, dtype=torch.float64, **options):
    s, t = features(1, images=images, dtype=dtype), features(2, images=images, dtype=dtype)
    student = head_outputs(3, images=images, dtype=dtype, requires_grad=True)
    return GIDLoss(**options), [x.requires_grad_() for x in s], t, student, head_outputs(4, images=images, dtype=dtype)


def gradients(value, s, student):
    own = [*s, *leaves(student)]
    found = torch.autograd.grad(value.sum(), own, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, own, strict=True)]


def _listed(outputs):
    return {
        "classes": torch.cat(outputs.classification, 1).tolist(),
        "deltas": torch.cat(outputs.regression, 1).tolist(),
        "boxes": torch.cat(outputs.boxes, 1).tolist(),
    }


def test_terms_are_those_of_the_loops():
    loss, s, t, student, teacher = case()
    got = loss.terms(s, loss.teacher_side(t, teacher_outputs=teacher), student_outputs=student)
    planes = [[[image.tolist() for image in x] for x in levels] for levels in (s, t)]
    anchors = torch.cat(teacher.anchors).tolist()
    want = loops.terms(*planes, _listed(student), _listed(teacher), anchors, [8.0, 16.0])
    for term, value in want.items():
        assert_close(got[term], value, RTOL64, what=term)
        assert got[term].shape == (1, 2) and got[term].sum() > 0


def test_entries_add_up_and_the_functional_form_is_the_same():
    loss, s, t, student, teacher = case(reduction="none")
    entries = loss(s, t, student, teacher)
    total = functional.gid(s, t, student, teacher)
    assert_close(total, entries.sum(), RTOL64)
    for a, b in zip(gradients(entries, s, student), gradients(total, s, student), strict=True):
        assert_close(a, b, RTOL64)
    # Features, class logits and regressed numbers; never the boxes, which are constants.
    found = gradients(total, s, student)
    assert all(any(g.abs().max() > 0 for g in found[i : i + 2]) for i in (0, 2, 4))
    assert all(g.abs().max() == 0 for g in found[6:])


def test_the_order_of_the_images_does_not_matter():
    loss, s, t, student, teacher = case(images=3, reduction="none")
    order = torch.tensor([2, 0, 1])
    entries = loss(s, t, student, teacher)
    got = loss([x.detach()[order] for x in s], [x[order] for x in t], moved(student, order), moved(teacher, order))
    assert_close(got, entries[:, order].detach(), 1e-10)
    assert not torch.equal(got, entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_have_fp32_maths(dtype):
    loss, s, t, student, teacher = case(dtype=dtype)
    value = loss(s, t, student, teacher)
    assert value.dtype == torch.float32
    double = [o._replace(**{k: [x.detach().double() for x in getattr(o, k)] for k in o._fields}) for o in (student, teacher)]
    for x in (*double[0].classification, *double[0].regression):
        x.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in s]
    want = loss(exact, [x.double() for x in t], *double)
    assert_close(value.double(), want, 2e-5)
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    got = torch.autograd.grad(value, [*s, *student.classification])
    wanted = torch.autograd.grad(want, [*exact, *double[0].classification])
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert_close(a.double(), b, limit, atol=1e-9)


def test_no_images_no_levels_and_few_instances():
    loss, s, t, student, teacher = case(images=0, reduction="none")
    assert loss(s, t, student, teacher).shape == (1, 0)
    nothing = levels_of(teacher, [])
    assert GIDLoss()([], [], nothing, nothing).item() == 0
    loss, s, t, student, teacher = case(images=1)
    one = [head_outputs(seed, [(1, 2)], (8,), images=1) for seed in (3, 4)]
    side = loss.teacher_side([t[0][..., :1, :2]], teacher_outputs=one[1])
    terms = loss.terms([s[0][..., :1, :2]], side, student_outputs=one[0])
    assert terms["relation"].item() == 0 and terms["feature"].item() > 0


def test_wrapped_and_fused_it_has_the_value_of_its_terms():
    loss, s, t, student, teacher = case(reduction="none")
    entries = loss(s, t, student, teacher).detach()
    losses = torch.tensor([[0.5, 2.0]])
    aid = AIDLoss(loss, granularity="image")(s, t, student, teacher, teacher_losses=losses)
    assert_close(aid, entries * torch.exp(-0.1 * losses), 1e-6)
    given = {"student_outputs": student, "teacher_outputs": teacher}
    together = FusedLoss({"aid": AIDLoss(loss, granularity="image"), "pad": PADLoss(loss)})(s, t, teacher_losses=losses, **given)
    assert_close(together["aid"], aid, RTOL64)
    assert together["pad"].shape == (1, 2)


def test_instances_are_where_both_differ_and_boxes_of_the_surer_one():
    student, teacher = head_outputs(3, images=1), head_outputs(4, images=1)
    for o in (student, teacher):
        for x in o.classification:
            x.fill_(-3.0)
    teacher.classification[0][0, 10, 1] = 4.0
    student.classification[1][0, 5, 2] = 3.0
    found = general_instances(student, teacher, 1e6)[0]
    assert torch.equal(found[0], teacher.boxes[0][0, 10]) and torch.equal(found[1], student.boxes[1][0, 5])
    assert len(found) <= 10
    student.boxes[0][0, 3] = float("nan")
    teacher.boxes[0][0, 10] = torch.tensor([-1e30, 0.0, 1e30, 9.0])
    bounded = general_instances(student, teacher, 512.0)[0]
    assert bounded.isfinite().all() and bounded[0].tolist() == [-512.0, 0.0, 512.0, 9.0]


def test_strides_come_from_the_anchors():
    anchors = head_outputs(1, [(6, 8), (3, 1), (1, 1)], (8, 16, 32), per_cell=2).anchors
    assert anchor_strides(anchors, [(6, 8), (3, 1), (1, 1)], ["0", "1", "2"]) == [8.0, 16.0, 32.0]
    assert anchor_strides(anchors[2:], [(1, 1)], ["pool"]) == [32.0]


def test_levels_that_are_not_the_finest_first_are_refused():
    loss, s, t, student, teacher = case()
    s, t = ({"coarse": x[1], "fine": x[0]} for x in (s, t))
    said = r"teacher_outputs: the levels' anchors have strides \[coarse: 16, fine: 8\], wanted ascending ones above 0"
    with pytest.raises(ValueError, match=said):
        loss(s, t, levels_of(student, [1, 0]), levels_of(teacher, [1, 0]))


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_single_cell_whose_anchors_have_no_size_is_refused(bad):
    _, s, t, *_ = case(images=1)
    student, teacher = (head_outputs(seed, [(1, 1)], (8,), images=1) for seed in (3, 4))
    teacher.anchors[0].fill_(bad)
    with pytest.raises(ValueError, match=rf"anchors have strides \[0: {bad:g}\], wanted ascending ones above 0"):
        GIDLoss()([s[0][..., :1, :1]], [t[0][..., :1, :1]], student, teacher)


def test_distances_of_equal_regions_are_0():
    same = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    value = distances(same)
    assert value.abs().sum() == 0 and torch.autograd.grad(value.sum(), same)[0].isfinite().all()


def test_what_does_not_fit_or_is_missing_is_named(monkeypatch):
    loss, s, t, student, teacher = case()
    with pytest.raises(ValueError, match="GIDLoss needs teacher_outputs, which is missing"):
        loss(s, t, student)
    with pytest.raises(ValueError, match="classification do not fit"):
        loss(s, t, head_outputs(3, classes=4), teacher)
    with pytest.raises(ValueError, match=r"(?s)level 0.*student_features.*\(2, 3, 6, 8\).*teacher_features.*\(2, 4, 6, 8\)"):
        loss(features(1, channels=3), t, student, teacher)
    with pytest.raises(ValueError, match=r"need equal channels: \[0: \(2, 4, 6, 8\), 1: \(2, 5, 3, 4\)\]"):
        loss.teacher_side([t[0], torch.zeros(2, 5, 3, 4)], teacher_outputs=teacher)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        loss(s, t, student, teacher)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so(bad):
    loss, s, t, student, teacher = case()
    with torch.no_grad():
        student.regression[0][0, 20] = bad
    assert not torch.isfinite(loss(s, t, student, teacher))
    assert {found.term for found in loss.check()} == {"regression"}


def test_an_empty_batch_has_a_backward_pass():
    loss, s, t, student, teacher = case(images=0)
    value = loss(s, t, student, teacher)
    value.backward()
    assert value.item() == 0 and all(x.grad is not None for x in [*s, *student.classification, *student.boxes])


def test_relations_do_not_know_the_scale_of_either_side():
    loss, s, t, student, teacher = case()

    def terms(own, theirs):
        return loss.terms(own, loss.teacher_side(theirs, teacher_outputs=teacher), student_outputs=student)

    want, got = terms(s, t), terms([3.0 * x for x in s], [0.2 * x for x in t])
    assert want["relation"].sum() > 0
    assert_close(got["relation"], want["relation"].detach(), RTOL64)
    # The features themselves are compared with their scale.
    assert (got["feature"] / want["feature"] - 1).abs().min() > 0.1
    # A student that is the teacher at another scale has no relation to learn.
    assert terms([7.0 * x for x in t], t)["relation"].sum() < 1e-20
