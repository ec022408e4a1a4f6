"""FGD's relation: the blocks' shift against the sum written out, its precision, and losses without it."""

from __future__ import annotations

import pytest
import torch
from levels import relative_error
from method_support import FOCAL, call, given, gradients, made, new, widened

from kdkernels import FGDLoss, FusedLoss, GmaskLoss
from kdkernels.losses.gc_block import GcBlock

ONLY = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "lambda_": 0.3}


def _block(block: GcBlock, x):
    """The block as its paper writes it: the features plus what is made of their context, all of the features' size."""
    shares = block.logits(x).flatten(2).softmax(2)
    context = (x.flatten(2) * shares).sum(2)[:, :, None, None]
    return x + block.transform(context)


def _relation(loss, case):
    parts = loss.trainable
    levels = zip(parts.student, case["student_features"], parts.teacher, case["teacher_features"], strict=True)
    return sum((_block(a, s) - _block(b, t)).square().sum() for a, s, b, t in levels) * 0.3 / 3


def _only_relation(case, dtype=torch.float64):
    loss = FGDLoss(**ONLY).build(case["student_features"], case["teacher_features"])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return loss.to(dtype)


def test_relation_is_the_difference_of_what_leaves_the_blocks():
    case = given(1)
    loss = _only_relation(case)
    got, want = call(loss, case), _relation(loss, case)
    assert relative_error(got.detach(), want.detach()) < 1e-12
    leaves = [*case["student_features"], *loss.parameters()]
    found = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (got, want)]
    whole = max(float(g.norm()) for g in found[1])
    assert all(float((a - b).norm()) <= 1e-12 * max(float(b.norm()), whole) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_far_from_0_keep_their_digits(dtype):
    # Means that are far above the spread, on both sides, as ReLU leaves them.
    case = given(2, [(3, 8, 24, 36), (3, 8, 12, 18)], dtype)
    for key in ("student_features", "teacher_features"):
        case[key] = [(x.detach() + 8).requires_grad_() for x in case[key]]
    loss = _only_relation(case, torch.float32)
    wide, other = widened(loss, case)
    got, want = call(loss, case), _relation(wide, other)
    assert relative_error(got.detach(), want.detach()) < 2e-5
    found, wanted = gradients(got, case), gradients(want, other)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    assert all(relative_error(a, b) < tolerance for a, b in zip(found, wanted, strict=True))


def test_blocks_start_as_nothing():
    case = given(3)
    loss = FGDLoss(**ONLY).build(case["student_features"], case["teacher_features"]).double()
    apart = sum((s - t).square().sum() for s, t in zip(case["student_features"], case["teacher_features"], strict=True))
    value = call(loss, case)
    assert relative_error(value.detach(), (apart * 0.3 / 3).detach()) < 1e-12
    value.backward()
    moved = {name for name, p in loss.trainable.named_parameters() if float(p.grad.abs().max()) > 0}
    assert moved and all("transform.3" in name for name in moved)


def test_without_relation_nothing_is_trained_and_passes_are_shared():
    case = given(4)
    losses = {"fgd": new("fgd alone"), "gmask": GmaskLoss(lambda_=0.0), "trained": made("fgd", case)}
    values = FusedLoss(losses)(**case)
    assert [loss.shares() for loss in losses.values()] == [True, True, False]
    assert [bool(list(loss.parameters())) for loss in losses.values()] == [False, False, True]
    assert all(bool(torch.isfinite(value)) for value in values.values())


@pytest.mark.parametrize("term", ["alpha", "beta", "gamma", "lambda_"])
def test_a_term_with_a_coefficient_of_0_is_not_computed(term):
    case = given(5)
    loss = FGDLoss(**{**FOCAL, term: 0.0})
    loss.build(case["student_features"], case["teacher_features"])
    side = loss.teacher_side(case["teacher_features"], boxes=case["boxes"], image_size=case["image_size"])
    names = {"alpha": "foreground", "beta": "background", "gamma": "attention", "lambda_": "relation"}
    assert set(loss.terms(case["student_features"], side)) == set(names.values()) - {names[term]}
    assert {name: loss.coefficient(name) for name in names.values()} == {names[key]: 0.0 if key == term else FOCAL[key] for key in FOCAL}


def test_boxes_may_be_left_out_when_no_term_needs_them():
    case = given(6)
    loss = FGDLoss(alpha=0.0, beta=0.0)
    assert float(loss(case["student_features"], case["teacher_features"]).detach()) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict.fromkeys(FOCAL, 0.0), "all 0"),
        ({"mask": "round"}, "(?s)mask.*round"),
        ({"temperature": 0.0}, "temperature"),
        ({"preset": "atss"}, "(?s)preset.*atss"),
    ],
)
def test_options_that_are_not_defined_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        FGDLoss(**options)
