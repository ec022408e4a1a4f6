"""FusedLoss: the same values and gradients as the loops give for each loss alone, their sum's gradient, and what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import aid, bmfi, cases, gkd
from oracle.compare import RTOL32, RTOL_MASK, assert_close, assert_levels_close

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, backend, functional

LOSSES = np.array([[0.1, 2.0], [0.5, 0.0], [3.0, 1.25]])
BMFI = bmfi.BMFI(alpha=0.4, gamma=0.3, lambda_=0.2)
IMITATION = gkd.GKD(form="imitation", weight=20.0)


def _losses() -> dict:
    return {
        "gkd": GKDLoss(reduction="none"),
        "released": GKDLoss(preset="release", weight=0.1, reduction="none"),
        "bmfi": BMFILoss(alpha=0.4, gamma=0.3, lambda_=0.2, reduction="none"),
        "aid": AIDLoss(BMFILoss(alpha=0.4, gamma=0.3, lambda_=0.2, reduction="none"), granularity="image"),
        "imitate": GKDLoss(form="imitation", weight=20.0, reduction="none"),
    }


def _expected(s, t, g_s, g_t):
    """name -> ((L, N) by the loops, function of an upstream (L, N) to the gradient by the loops)."""
    frame = cases.BOXES, cases.IMAGE_SIZE
    weights = aid.weights(LOSSES, "image", len(s), 2)
    released = gkd.GKD(weight=0.1, channel_weight="abs", activation="abs", rectify="relu", eps=1e-7, eps_mode="absolute")
    return {
        "gkd": (gkd.map_value(s, t, g_s, g_t), lambda up: gkd.map_gradient(s, t, g_s, g_t, up)),
        "released": (gkd.map_value(s, t, g_s, g_t, released), lambda up: gkd.map_gradient(s, t, g_s, g_t, up, released)),
        "bmfi": (bmfi.value(s, t, *frame, BMFI), lambda up: bmfi.gradient(s, t, *frame, BMFI, up)),
        "aid": (weights * bmfi.value(s, t, *frame, BMFI), lambda up: bmfi.gradient(s, t, *frame, BMFI, weights * up)),
        "imitate": (
            gkd.imitation_value(s, t, g_t, IMITATION, *frame),
            lambda up: gkd.imitation_gradient(s, t, g_t, up, IMITATION, *frame),
        ),
    }


def _call(fused, arrays, dtype=torch.float64):
    x = cases.tensors(arrays[0], dtype, requires_grad=True)
    others = [cases.tensors(levels, dtype) for levels in arrays[1:]]
    frame = {"boxes": cases.box_tensors(), "image_size": cases.IMAGE_SIZE, "teacher_losses": torch.tensor(LOSSES)}
    return x, fused(x, *others, **frame)


def test_each_value_and_gradient():
    arrays = cases.four(1)
    x, got = _call(FusedLoss(_losses()), arrays)
    expected = _expected(*arrays)
    assert list(got) == list(expected)
    for name, (value, gradient) in expected.items():
        assert_close(got[name], value, RTOL_MASK, what=name)
        up = cases.upstream(2, 3, 2)
        gradients = torch.autograd.grad((got[name] * torch.tensor(up)).sum(), x, retain_graph=True)
        assert_levels_close(gradients, gradient(up), RTOL_MASK, atol=1e-10, what=f"{name}: gradient of level")


def test_the_gradient_of_a_weighted_sum():
    arrays = cases.four(3)
    x, got = _call(FusedLoss(_losses()), arrays)
    factors = {name: 0.3 + 0.5 * i for i, name in enumerate(got)}
    gradients = torch.autograd.grad(sum(factors[name] * value.sum() for name, value in got.items()), x)
    parts = [gradient(np.full((3, 2), factors[name])) for name, (_, gradient) in _expected(*arrays).items()]
    assert_levels_close(gradients, [sum(levels) for levels in zip(*parts, strict=True)], RTOL_MASK, what="gradient of level")


def test_the_same_bits_as_each_loss_alone(monkeypatch):
    """On the reference: what fused kernels share they add in another order."""
    monkeypatch.setattr(backend, "_choice", "reference")
    arrays = cases.four(4)
    x, got = _call(FusedLoss(_losses()), arrays, torch.float32)
    t, g_s, g_t = (cases.tensors(levels, torch.float32) for levels in arrays[1:])
    frame, losses = (cases.box_tensors(), cases.IMAGE_SIZE), _losses()
    alone = {
        "gkd": losses["gkd"](x, t, g_s, g_t),
        "released": losses["released"](x, t, g_s, g_t),
        "bmfi": losses["bmfi"](x, t, *frame),
        "aid": losses["aid"](x, t, *frame, teacher_losses=torch.tensor(LOSSES)),
        "imitate": losses["imitate"](x, t, None, g_t, *frame),
    }
    for name, value in alone.items():
        assert torch.equal(got[name], value), name
        a, b = (torch.autograd.grad(v.sum(), x, retain_graph=True) for v in (got[name], value))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)), name


def test_reductions_are_kept_per_loss():
    arrays = cases.four(5)
    _, got = _call(FusedLoss({"a": GKDLoss(), "b": GKDLoss(reduction="none")}), arrays)
    assert got["a"].shape == ()
    assert got["b"].shape == (3, 2)
    assert_close(got["a"], gkd.map_value(*arrays).sum())


def test_two_losses_of_the_same_kind_and_half_precision():
    arrays = [cases.rounded(levels, torch.bfloat16) for levels in cases.four(6)]
    x = cases.tensors(arrays[0], torch.bfloat16, requires_grad=True)
    fused = FusedLoss({"one": GKDLoss(reduction="none"), "two": GKDLoss(distance="mse", weight=2.0, reduction="none")})
    got = fused(x, *(cases.tensors(levels, torch.bfloat16) for levels in arrays[1:]))
    assert_close(got["one"], gkd.map_value(*arrays), RTOL32)
    assert_close(got["two"], gkd.map_value(*arrays, gkd.GKD(distance="mse", weight=2.0)), RTOL32)
    gradients = torch.autograd.grad(got["one"].sum() + got["two"].sum(), x)
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    up = np.ones((3, 2))
    parts = gkd.map_gradient(*arrays, up), gkd.map_gradient(*arrays, up, gkd.GKD(distance="mse", weight=2.0))
    # bf16: half a unit (2^-9) for each rounding of a gradient and one for their sum in bf16.
    assert_levels_close(gradients, [a + b for a, b in zip(*parts, strict=True)], rtol=2.0**-7, atol=1e-5, what="gradient of level")


def test_repeats_and_second_backwards_are_equal_bit_for_bit():
    arrays = cases.four(7, [(2, 8, 9, 11), (2, 8, 5, 3), (2, 8, 2, 2)])
    runs = []
    for _ in range(2):
        x, got = _call(FusedLoss(_losses()), arrays, torch.float32)
        total = sum(value.sum() for value in got.values())
        first = torch.autograd.grad(total, x, retain_graph=True)
        second = torch.autograd.grad(total, x, torch.tensor(0.5))
        assert all(torch.equal(a / 2, b) for a, b in zip(first, second, strict=True))
        runs.append([total, *first])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_functional():
    arrays = cases.four(8)
    _, got = _call(lambda *args, **kwargs: functional.fused(_losses(), *args, **kwargs), arrays)
    for name, (value, _) in _expected(*arrays).items():
        assert_close(got[name], value, RTOL_MASK, what=name)


def test_no_loss_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one loss"):
        FusedLoss({})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("gkd", "student_gradients"),
        ("gkd", "teacher_gradients"),
        ("imitate", "teacher_gradients"),
        ("bmfi", "boxes"),
        ("bmfi", "image_size"),
        ("aid", "teacher_losses"),
        ("aid", "boxes"),
    ],
)
def test_a_missing_argument_is_named_with_its_loss(name, argument):
    s, t, g_s, g_t = (cases.tensors(levels) for levels in cases.four(10))
    given = {
        "student_gradients": g_s,
        "teacher_gradients": g_t,
        "boxes": cases.box_tensors(),
        "image_size": cases.IMAGE_SIZE,
        "teacher_losses": torch.tensor(LOSSES),
    }
    given[argument] = None
    with pytest.raises(ValueError, match=f"(?s){name}.*{argument}"):
        FusedLoss({name: _losses()[name]})(s, t, **given)


def test_needs_are_the_union_and_unneeded_arguments_may_be_missing():
    fused = FusedLoss(_losses())
    assert fused.needs == {"student_gradients", "teacher_gradients", "boxes", "teacher_losses"}
    s, t = (cases.tensors(levels) for levels in cases.four(11)[:2])
    assert FusedLoss({"bmfi": BMFILoss(alpha=0.0)}).needs == frozenset()
    assert FusedLoss({"bmfi": BMFILoss(alpha=0.0)})(s, t)["bmfi"].item() > 0
    assert FusedLoss({"imitate": GKDLoss(form="imitation")}).needs == {"teacher_gradients"}


def test_flags_carry_the_names_given_here():
    s, t, g_s, g_t = (cases.tensors(levels) for levels in cases.four(12))
    s[1][1, 0, 0, 0] = float("nan")
    fused = FusedLoss({"first": GKDLoss(), "second": BMFILoss(lambda_=0.1)})
    fused(s, t, g_s, g_t, cases.box_tensors(), cases.IMAGE_SIZE)
    found = fused.check()
    assert {(f.loss, f.term, f.level, f.image) for f in found} == {
        ("first", "map", 1, 1),
        ("second", "region", 1, 1),
        ("second", "attention", 1, 1),
        ("second", "whole", 1, 1),
    }
    assert fused.check() == []
