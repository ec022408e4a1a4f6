"""AIDLoss: exp(-alpha * t) inside the (L, N) matrix of any loss, every granularity, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import aid, bmfi, cases, gkd
from oracle.compare import RTOL_MASK, assert_close, assert_levels_close

from kdkernels import AIDLoss, BMFILoss, GKDLoss, functional

LOSSES = np.array([[0.1, 2.0], [0.5, 0.0], [3.0, 1.25]])
GRANULARITIES = ["image", "level", "level x image", "batch"]
# The weight is one fp32 exponential: a relative error of a few 2^-24 on fp64 values.
RTOL_WEIGHT = 5e-7


def _inputs(seed):
    s, t, g_s, g_t = cases.four(seed)
    return (s, t, g_s, g_t), [cases.tensors(s, requires_grad=True), *(cases.tensors(x) for x in (t, g_s, g_t))]


def _check(weights, teacher_losses, seed=1, base=None, **options):
    """AID on GKD, whose entries are exact in fp64, against the loops' weight times the loops' entries and gradient."""
    arrays, args = _inputs(seed)
    loss = AIDLoss(GKDLoss(reduction="none") if base is None else base, **options)
    got = loss(*args, teacher_losses=teacher_losses)
    assert_close(got, weights * gkd.map_value(*arrays), RTOL_WEIGHT)
    gradients = torch.autograd.grad(got.sum(), args[0])
    assert_levels_close(gradients, gkd.map_gradient(*arrays, weights), RTOL_WEIGHT, atol=1e-9, what="gradient of level")


@pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularities(granularity, alpha):
    weights = aid.weights(LOSSES, granularity, 3, 2, alpha)
    _check(weights, torch.tensor(LOSSES), alpha=alpha, granularity=granularity)


def test_image_weights_by_hand():
    arrays, args = _inputs(2)
    got = AIDLoss(GKDLoss(reduction="none"), granularity="image")(*args, teacher_losses=torch.tensor(LOSSES))
    plain = gkd.map_value(*arrays)
    assert_close(got[:, 0], math.exp(-0.36) * plain[:, 0], RTOL_WEIGHT)
    assert_close(got[:, 1], math.exp(-0.325) * plain[:, 1], RTOL_WEIGHT)


@pytest.mark.parametrize("shape", [(), (3, 2), (3, 1), (1, 2), (1, 1)], ids=str)
def test_losses_are_used_as_given_without_a_granularity(shape):
    t = np.random.RandomState(3).uniform(0, 4, shape)
    _check(np.broadcast_to(np.exp(-0.1 * t), (3, 2)), torch.tensor(t))


def test_parts_are_added_for_a_base_that_has_one_weight():
    parts = {"classification": 0.25 * torch.tensor(LOSSES), "regression": 0.75 * torch.tensor(LOSSES)}
    _check(aid.weights(LOSSES, "image", 3, 2), parts, granularity="image")
    _, args = _inputs(1)
    with pytest.raises(ValueError, match=r"wanted the parts \['classification', 'regression'\], got \['classification'\]"):
        AIDLoss(GKDLoss())(*args, teacher_losses={"classification": 1.0})


def test_a_python_number_is_a_scalar():
    _check(np.full((3, 2), math.exp(-0.1 * 1.5)), 1.5)


@pytest.mark.parametrize(("granularity", "size"), [("image", 2), ("level", 3)])
def test_vectors_need_a_granularity(granularity, size):
    t = np.arange(1.0, size + 1)
    weights = np.exp(-0.1 * (t[None, :] if granularity == "image" else t[:, None]))
    _check(np.broadcast_to(weights, (3, 2)), torch.tensor(t), granularity=granularity)
    _, args = _inputs(1)
    with pytest.raises(ValueError, match=r"(?s)granularity.*image.*level"):
        AIDLoss(GKDLoss())(*args, teacher_losses=torch.tensor(t))


def test_one_image_summed_over_levels_may_come_as_a_row():
    t = np.array([[1.0, 2.0]])
    _check(np.broadcast_to(np.exp(-0.1 * t), (3, 2)), torch.tensor(t), granularity="image")


def test_as_many_levels_as_images_are_not_mixed_up():
    shapes = [(2, 3, 3, 3), (2, 3, 2, 2)]
    s, t, g_s, g_t = cases.four(4, shapes)
    args = [cases.tensors(x) for x in (s, t, g_s, g_t)]
    losses = np.array([1.0, 5.0])
    plain = gkd.map_value(s, t, g_s, g_t)
    for granularity, weights in (("image", np.exp(-0.1 * losses)[None, :]), ("level", np.exp(-0.1 * losses)[:, None])):
        got = AIDLoss(GKDLoss(reduction="none"), granularity=granularity)(*args, teacher_losses=torch.tensor(losses))
        assert_close(got, weights * plain, RTOL_WEIGHT)


def test_the_weight_is_detached_and_fp32():
    _, args = _inputs(5)
    t = torch.tensor(LOSSES, dtype=torch.float32, requires_grad=True)
    AIDLoss(GKDLoss())(*args, teacher_losses=t).backward()
    assert t.grad is None
    half = torch.tensor(LOSSES, dtype=torch.bfloat16)
    _check(np.exp(-0.1 * half.double().numpy()), half)


def test_zero_loss_changes_nothing_and_a_large_one_switches_off():
    _, args = _inputs(6)
    assert torch.equal(AIDLoss(GKDLoss())(*args, teacher_losses=torch.tensor(0.0)), GKDLoss()(*args))
    assert torch.equal(AIDLoss(GKDLoss())(*args, teacher_losses=0.5), AIDLoss(GKDLoss())(*args, teacher_losses=torch.tensor(0.5)))
    assert AIDLoss(GKDLoss())(*args, teacher_losses=torch.tensor(1e9)).item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_teacher_losses_stay_visible(bad):
    _, args = _inputs(6)
    t = torch.tensor(LOSSES)
    t[1, 0] = bad
    loss = AIDLoss(GKDLoss(reduction="none"))
    got = loss(*args, teacher_losses=t)
    assert torch.isfinite(got).tolist() == [[True, True], [False, True], [True, True]]
    assert [(f.level, f.image) for f in loss.check()] == [(1, 0)]
    by_image = AIDLoss(GKDLoss(reduction="none"), granularity="image")(*args, teacher_losses=t)
    assert torch.isfinite(by_image).tolist() == [[False, True]] * 3


def test_reduction_is_the_bases():
    arrays, args = _inputs(7)
    scalar = AIDLoss(GKDLoss())(*args, teacher_losses=torch.tensor(LOSSES))
    assert scalar.shape == ()
    assert_close(scalar, (np.exp(-0.1 * LOSSES) * gkd.map_value(*arrays)).sum(), RTOL_WEIGHT)


def test_on_bmfi():
    s, t, _, _ = cases.four(8)
    x = cases.tensors(s, requires_grad=True)
    options = bmfi.BMFI(lambda_=0.3)
    loss = AIDLoss(BMFILoss(lambda_=0.3, reduction="none"), granularity="image")
    got = loss(x, cases.tensors(t), cases.box_tensors(), cases.IMAGE_SIZE, teacher_losses=torch.tensor(LOSSES))
    weights = aid.weights(LOSSES, "image", 3, 2)
    assert_close(got, weights * bmfi.value(s, t, cases.BOXES, cases.IMAGE_SIZE, options), RTOL_MASK)
    want = bmfi.gradient(s, t, cases.BOXES, cases.IMAGE_SIZE, options, weights)
    assert_levels_close(torch.autograd.grad(got.sum(), x), want, RTOL_MASK, what="gradient of level")


def test_on_imitation_and_nested():
    s, t, _, g_t = cases.four(9)
    base = GKDLoss(form="imitation", reduction="none")
    loss = AIDLoss(AIDLoss(base, alpha=0.1), alpha=0.3)
    got = loss(cases.tensors(s), cases.tensors(t), None, cases.tensors(g_t), teacher_losses=torch.tensor(LOSSES))
    assert_close(got, np.exp(-0.4 * LOSSES) * gkd.imitation_value(s, t, g_t), RTOL_WEIGHT)


def test_what_it_needs_is_what_the_base_needs_and_teacher_losses():
    assert AIDLoss(GKDLoss()).needs == GKDLoss().needs | {"teacher_losses"}
    assert AIDLoss(BMFILoss()).needs == BMFILoss().needs | {"teacher_losses"}
    _, args = _inputs(10)
    with pytest.raises(ValueError, match="teacher_losses"):
        AIDLoss(GKDLoss())(*args)


@given(levels=st.integers(1, 3), images=st.integers(1, 3), seed=st.integers(0, 99), granularity=st.sampled_from(GRANULARITIES))
def test_any_shape(levels, images, seed, granularity):
    s, t, g_s, g_t = cases.four(seed, [(images, 2, 3, 4 - level) for level in range(levels)])
    losses = np.random.RandomState(seed).uniform(0, 5, (levels, images))
    loss = AIDLoss(GKDLoss(reduction="none"), granularity=granularity)
    got = loss(*(cases.tensors(x) for x in (s, t, g_s, g_t)), teacher_losses=torch.tensor(losses))
    assert_close(got, aid.weights(losses, granularity, levels, images) * gkd.map_value(s, t, g_s, g_t), RTOL_WEIGHT)


@pytest.mark.parametrize(
    ("granularity", "shape"), [(None, (2, 3)), (None, (4, 2)), ("image", (3,)), ("level", (2,)), ("level x image", (2, 3))]
)
def test_losses_that_do_not_fit_are_refused_with_both_shapes(granularity, shape):
    _, args = _inputs(11)
    with pytest.raises(ValueError, match=r"(?s)" + str(shape).replace("(", r"\(").replace(")", r"\)") + r".*3.*2"):
        AIDLoss(GKDLoss(), granularity=granularity)(*args, teacher_losses=torch.zeros(shape))


@pytest.mark.parametrize(
    ("given_features", "said"),
    [({}, "student_features and teacher_features"), ({"student_features": []}, "teacher_features")],
)
def test_features_that_are_not_given_are_named(given_features, said):
    with pytest.raises(TypeError, match=f"AIDLoss needs {said}, which BMFILoss compares"):
        AIDLoss(BMFILoss())(teacher_losses=1.0, **given_features)


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match=r"(?s)granularity.*box"):
        AIDLoss(GKDLoss(), granularity="box")


def test_functional():
    arrays, args = _inputs(12)
    t = torch.tensor(LOSSES)
    got = functional.aid(GKDLoss(), *args, teacher_losses=t, granularity="image")
    assert_close(got, (aid.weights(LOSSES, "image", 3, 2) * gkd.map_value(*arrays)).sum(), RTOL_WEIGHT)
