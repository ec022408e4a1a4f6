"""PADLoss: each level divided by the student's variance, on losses of every kind."""

from __future__ import annotations

import pytest
import torch
from losses_support import pyramids, value_and_gradients
from oracle import cases
from oracle.compare import RTOL64, assert_close, assert_levels_close

from kdkernels import AIDLoss, BMFILoss, DistillationLoss, FusedLoss, GKDLoss, PADLoss, PKDLoss
from kdkernels.losses import FitNetsLoss


def _terms(terms, coefficients, s, eps):
    """The formula, in torch's own operations."""
    log_variance = torch.stack([x.var(correction=0).log() for x in s])[:, None]
    return sum(term / (eps + log_variance.exp()) + coefficients[name] * log_variance / term.shape[1] for name, term in terms.items())


@pytest.mark.parametrize(("preset", "eps"), [("one-stage", 1e-6), ("two-stage", 1e-8), ("one-stage", 0.3)])
def test_every_term_gets_its_own_share(preset, eps):
    s, t = pyramids(1)
    base = BMFILoss(weight=2.0, alpha=0.4, gamma=0.3, lambda_=0.2, mask="binary", reduction="none")
    boxes = {"boxes": cases.box_tensors(), "image_size": cases.IMAGE_SIZE}
    given = {} if eps in (1e-6, 1e-8) else {"eps": eps}
    got, gradients = value_and_gradients(PADLoss(base, preset, **given), s, t, **boxes)
    terms = base.terms(s, base.teacher_side(t, **boxes))
    want = _terms(terms, dict.fromkeys(terms, 2.0), s, eps)
    assert_close(got, want, RTOL64)
    assert not torch.allclose(got, base(s, t, **boxes))
    expected = torch.autograd.grad(want.sum(), s)
    assert_levels_close(gradients, [g.numpy() for g in expected], RTOL64, what="gradient of level")


def test_it_asks_for_what_its_base_asks():
    base = AIDLoss(GKDLoss(grad_mode="second_order"), granularity="level")
    loss = PADLoss(base)
    assert loss.needs == base.needs
    assert (loss.grad_mode, loss.granularity, loss.weight) == ("second_order", "level", 1.0)
    assert loss.inline_refusal() == base.inline_refusal() is not None
    s, t = pyramids(2)
    with pytest.raises(ValueError, match="student_gradients"):
        FusedLoss({"kd": loss})(s, t, teacher_losses=1.0)


def test_around_gkd_and_by_position():
    arrays = cases.four(3)
    s, t, g_s, g_t = (cases.tensors(x) for x in arrays)
    base = GKDLoss(reduction="none")
    want = _terms({"map": base(s, t, g_s, g_t)}, {"map": 1.0}, s, 1e-6)
    assert_close(PADLoss(base)(s, t, g_s, g_t), want, RTOL64)
    assert_close(PADLoss(base)(s, t, student_gradients=g_s, teacher_gradients=g_t), want, RTOL64)
    with pytest.raises(TypeError, match="takes no argument teacher_losses"):
        PADLoss(base)(s, t, g_s, g_t, teacher_losses=1.0)
    with pytest.raises(TypeError, match="teacher_features twice"):
        PADLoss(base)(s, t, teacher_features=t)
    with pytest.raises(TypeError, match="takes 6 arguments, got 7"):
        PADLoss(base)(*([s] * 7))


def test_constant_features_count_as_the_smallest_variance():
    _, t = pyramids(4)
    s = [torch.full_like(x, 0.3).requires_grad_() for x in t]
    value, gradients = value_and_gradients(PADLoss(PKDLoss()), s, t)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_a_variance_that_is_not_finite_stays_visible():
    s, t = pyramids(5)
    with torch.no_grad():
        s[0][0, 0, 0, 0] = float("nan")
    entries = PADLoss(FitNetsLoss(reduction="none"))(s, t)
    assert torch.isfinite(entries).tolist() == [[False, False], [True, True], [True, True]]


def test_large_means_do_not_hide_the_variance():
    s, t = pyramids(6, dtype=torch.float32)
    moved = [(x.detach() + 1000).requires_grad_() for x in s]
    exact = [x.detach().double().requires_grad_() for x in moved]
    loss = PADLoss(FitNetsLoss())
    got = loss(moved, t)
    assert got.dtype == torch.float32 and got.isfinite()
    assert_close(got, loss(exact, [x.double() for x in t]), 2e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("mapped", [False, True])
def test_gradients_of_base_and_variance_are_rounded_once(dtype, rtol, mapped):
    """Of the size of each other and opposed: two roundings would show."""
    s, t = pyramids(8, dtype=dtype)
    exact, teacher = [x.detach().double().requires_grad_() for x in s], [x.double() for x in t]
    keys = "abcdef"
    given = [dict(zip(keys, levels, strict=False)) if mapped else levels for levels in (s, t)]
    for weight in (0.1, 1.0, 10.0):
        loss = PADLoss(FitNetsLoss(weight), eps=1.0)
        # The factor keeps fp16 gradients above its subnormal numbers.
        got = torch.autograd.grad(256 * loss(*given), s)
        want = torch.autograd.grad(256 * loss(exact, teacher), exact)
        assert {g.dtype for g in got} == {dtype}
        for g, w in zip(got, want, strict=True):
            # Element by element: half a unit in the last place, and what fp32 maths leaves of what cancels.
            assert ((g.double() - w).abs() <= rtol * w.abs() + 1e-6 * w.abs().max()).all()


class _WithoutLevels(DistillationLoss):
    """One number an image for the whole pyramid."""

    level_free = True
    argument_names = ("student_features", "teacher_features")

    def forward(self, student_features, teacher_features):
        return self.evaluate(student_features, teacher_features)

    def teacher_side(self, teacher_features, *_, **__):
        return teacher_features

    def terms(self, student_features, side, student_gradients=None):
        return {"total": torch.stack([x.sum((1, 2, 3)) for x in student_features]).sum(0, keepdim=True)}


def test_around_a_loss_without_levels_the_variance_is_of_all_values():
    s, t = pyramids(7)
    base = _WithoutLevels(weight=0.5, reduction="none")
    got, gradients = value_and_gradients(PADLoss(base), s, t)
    variance = torch.cat([x.flatten() for x in s]).var(correction=0)
    want = base(s, t) / (1e-6 + variance) + 0.5 * variance.log() / 2
    assert got.shape == (1, 2)
    assert_close(got, want, RTOL64)
    expected = torch.autograd.grad(want.sum(), s)
    assert_levels_close(gradients, [g.numpy() for g in expected], RTOL64, what="gradient of level")


def test_only_losses_are_wrapped():
    with pytest.raises(TypeError, match=r"PADLoss wraps a loss.*got Linear"):
        PADLoss(torch.nn.Linear(1, 1))
