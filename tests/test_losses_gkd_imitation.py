"""GKDLoss, imitation form: value and gradient against the loops, with and without maps, masks and weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, gkd
from oracle.compare import RTOL32, RTOL64, RTOL_MASK, assert_close, assert_levels_close

from kdkernels import GKDLoss, functional

IMITATION = dataclasses.replace(gkd.PAPER, form="imitation")
CHANGES = [
    {},
    {"spatial": False},
    {"weight": 20.0},
    {"channel_weight": "abs"},
    {"channel_weight": "elementwise"},
    {"channel_weight": "elementwise", "spatial": False},
    {"activation": "abs"},
    {"rectify": "relu"},
    {"rectify": "none", "normalize": "softmax"},
    {"normalize": "zscore", "spatial": False},
    {"normalize": "none"},
    {"eps": 0.25},
    {"eps": 0.25, "eps_mode": "absolute"},
]


def _check(inputs, options, boxes=None, rtol=RTOL64, image_size=cases.IMAGE_SIZE):
    s, t, g_t = inputs
    x = cases.tensors(s, requires_grad=True)
    loss = GKDLoss(**dataclasses.asdict(options), reduction="none")
    extra = {} if boxes is None else {"boxes": cases.box_tensors(boxes), "image_size": image_size}
    got = loss(x, cases.tensors(t), None, cases.tensors(g_t), **extra)
    want = gkd.imitation_value(s, t, g_t, options, boxes, image_size)
    assert_close(got, want, rtol, what="(level, image)")
    up = cases.upstream(0, *got.shape)
    gradients = torch.autograd.grad((got * torch.tensor(up)).sum(), x)
    assert_levels_close(gradients, gkd.imitation_gradient(s, t, g_t, up, options, boxes, image_size), rtol, what="gradient of level")
    return got


def _three(seed, shapes=cases.SHAPES):
    s, t, _, g_t = cases.four(seed, shapes)
    return s, t, g_t


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_each_option(change):
    got = _check(_three(1), dataclasses.replace(IMITATION, **change))
    assert got.abs().min() > 0


@pytest.mark.parametrize("spatial", [True, False])
def test_with_boxes(spatial):
    _check(_three(2), dataclasses.replace(IMITATION, spatial=spatial), cases.BOXES, RTOL_MASK)


def test_the_release_preset():
    s, t, g_t = _three(3)
    got = GKDLoss(preset="release", form="imitation", reduction="none")(cases.tensors(s), cases.tensors(t), None, cases.tensors(g_t))
    assert_close(got, gkd.imitation_value(s, t, g_t, gkd.RELEASE))


@pytest.mark.parametrize("spatial", [True, False])
def test_without_weights_there_is_nothing_to_learn(spatial):
    s, t, g_t = _three(4)
    g_t[0][1] = 0.0
    g_t[1][:] = 0.0
    got = _check((s, t, g_t), dataclasses.replace(IMITATION, spatial=spatial))
    assert [[bool(value > 0) for value in row] for row in got] == [[True, False], [False, False], [True, True]]


def test_signed_weights_that_cancel_are_no_weights():
    g_t = [np.array([[[[1.0, -1.0]], [[-2.0, 2.0]]]])]
    s, t, _ = _three(5, [(1, 2, 1, 2)])
    assert _check((s, t, g_t), dataclasses.replace(IMITATION, spatial=False)).item() == 0
    assert _check((s, t, g_t), dataclasses.replace(IMITATION, spatial=False, channel_weight="abs")).item() > 0


def test_equal_weights_without_maps_are_the_mean_square():
    s, t, _ = _three(6)
    got = _check((s, t, [np.full(level.shape, -3.0) for level in s]), dataclasses.replace(IMITATION, spatial=False))
    want = [((a - b) ** 2).mean((1, 2, 3)) / 2 for a, b in zip(s, t, strict=True)]
    assert_close(got, np.stack(want))


@pytest.mark.parametrize("exponent", [16, -20])
def test_the_scale_of_the_gradients_does_not_matter(exponent):
    s, t, g_t = _three(7)

    def run(scale):
        x = cases.tensors(s, torch.float32, requires_grad=True)
        value = GKDLoss(form="imitation")(x, cases.tensors(t, torch.float32), None, [scale * g for g in cases.tensors(g_t, torch.float32)])
        return [value, *torch.autograd.grad(value, x)]

    assert all(torch.equal(a, b) for a, b in zip(run(1.0), run(2.0**exponent), strict=True))


@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    images=st.integers(1, 3),
    channel_weight=st.sampled_from(["signed", "abs", "elementwise"]),
    spatial=st.booleans(),
)
def test_any_shape(seed, sizes, images, **options):
    _check(_three(seed, [(images, *size) for size in sizes]), dataclasses.replace(IMITATION, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    s, t, g_t = (cases.rounded(levels, dtype) for levels in _three(8))
    x = cases.tensors(s, dtype, requires_grad=True)
    got = GKDLoss(form="imitation", reduction="none")(x, cases.tensors(t, dtype), None, cases.tensors(g_t, dtype))
    assert got.dtype == torch.float32
    assert_close(got, gkd.imitation_value(s, t, g_t), rtol=RTOL32)
    want = gkd.imitation_gradient(s, t, g_t, np.ones((3, 2)))
    assert_levels_close(torch.autograd.grad(got.sum(), x), want, rtol=2.0**-8, what="gradient of level")


def test_gradcheck():
    s, t, g_t = (cases.tensors(levels) for levels in _three(9, [(2, 2, 2, 2), (2, 3, 1, 2)]))
    x = [level.requires_grad_() for level in s]

    def function(*levels):
        return GKDLoss(form="imitation", reduction="none")(levels, t, None, g_t)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_grad_mode_none():
    s, t, g_t = _three(10)
    value = GKDLoss(form="imitation", grad_mode="none")(cases.tensors(s, requires_grad=True), cases.tensors(t), None, cases.tensors(g_t))
    assert not value.requires_grad
    assert_close(value, gkd.imitation_value(s, t, g_t).sum())


@pytest.mark.parametrize("options", [{"normalize": "zscore"}, {"normalize": "none", "rectify": "none"}], ids=str)
def test_maps_with_negative_entries_are_no_weights(options):
    with pytest.raises(ValueError, match="negative"):
        GKDLoss(form="imitation", **options)


def test_functional():
    s, t, g_t = _three(11)
    got = functional.gkd(cases.tensors(s), cases.tensors(t), None, cases.tensors(g_t), form="imitation", spatial=False)
    assert_close(got, gkd.imitation_value(s, t, g_t, dataclasses.replace(IMITATION, spatial=False)).sum())
