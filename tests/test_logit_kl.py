"""`logit_kl`: value, gradient, blocks of bins, dtypes, layouts and near distributions against the loops."""

from __future__ import annotations

import math

import logit_support
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_support import check
from oracle import cases
from oracle.compare import assert_close
from torch.nn import functional as F

from kdkernels import functional

#: Temperature and blocks: LD's of boxes and of classes, one bin a block, and a cold one.
OPTIONS = [(1.0, 1), (10.0, 4), (2.0, 1), (0.5, 2), (1.0, 4)]
weights = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
options = pytest.mark.parametrize(("temperature", "groups"), OPTIONS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@weights
@options
def test_value_and_gradient(temperature, groups, weighted):
    rows = check("logit_kl", *logit_support.given(1, weighted=weighted), temperature, groups)
    assert rows.shape == (3, 2) and (rows >= 0).all()


def test_the_defaults_are_every_pixel_temperature_1_and_one_block_and_that_is_torch_s():
    s, t = (cases.tensors(cases.pyramid(k)) for k in (1, 2))
    want = [F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none").sum((1, 2, 3)) for a, b in zip(s, t, strict=True)]
    got = functional.logit_kl(s, t)
    assert_close(got, torch.stack(want).numpy())
    assert (functional.logit_kl(t, t) == 0).all() and (got >= 0).all() and got.any()


def test_blocks_are_consecutive_channels():
    s, t = (cases.tensors(cases.pyramid(k, [(2, 12, 3, 4)]))[0] for k in (3, 4))
    edges = [functional.logit_kl([s[:, 3 * i : 3 * i + 3]], [t[:, 3 * i : 3 * i + 3]], None, 2.0) for i in range(4)]
    got = functional.logit_kl([s], [t], None, 2.0, 4)
    assert_close(got, sum(edges).numpy())
    assert not torch.allclose(got, functional.logit_kl([s], [t], None, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@options
def test_16_bit_input_is_computed_in_fp32(dtype, temperature, groups):
    assert check("logit_kl", *logit_support.given(2), temperature, groups, dtype=dtype).dtype == torch.float32


@pytest.mark.parametrize("anchors", [1, 3])
def test_bins_of_anchors_as_a_head_makes_them(anchors):
    """(N, A, 4 * 17): a view as a pyramid, whose gradient has the view's strides."""
    s, t, weight = logit_support.given(3, [(2, 68, 5 * anchors, 1)])
    rows = check("logit_kl", s, t, weight, 10.0, 4, laid_out=lambda x: x[..., 0].transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(3))
    assert rows.shape == (1, 2)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_near_distributions_keep_their_digits(temperature):
    """Distributions that differ by 1 % have a divergence of 1e-5, the difference of sums of order 1."""
    t = [np.float32(x).astype(np.float64) for x in cases.pyramid(4)]
    s = [x + 1e-2 * temperature * y for x, y in zip(t, cases.pyramid(5), strict=True)]
    assert (check("logit_kl", s, t, None, temperature, 1, dtype=torch.float32) < 1e-2).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_constant_added_to_a_block_changes_nothing(offset):
    s, t, weight = logit_support.given(5)
    moved = check("logit_kl", [x + offset for x in s], t, weight, 1.0, 2)
    check("logit_kl", [x + offset for x in s], [x - offset for x in t], weight, 1.0, 2, dtype=torch.float32)
    assert_close(moved, functional.logit_kl(*map(cases.tensors, (s, t, weight)), 1.0, 2).numpy(), rtol=1e-10)
    # The last level is a pixel, whose weight may be 0.
    assert (moved[:2] > 0).all()


def test_large_logits():
    """A sure student and a sure teacher: 200 where they differ, 0 where they agree."""
    s, t = torch.tensor([200.0, 0.0, 200.0, 0.0]), torch.tensor([0.0, 200.0, 200.0, 0.0])
    x = s.view(1, 4, 1, 1).requires_grad_()
    row = functional.logit_kl([x], [t.view(1, 4, 1, 1)], None, 1.0, 2)
    assert row.item() == pytest.approx(200)
    assert torch.autograd.grad(row.sum(), x)[0].flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


def test_a_bin_that_the_teacher_rules_out_costs_nothing():
    s, t = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, -math.inf])
    x = s.view(1, 3, 1, 1).requires_grad_()
    row = functional.logit_kl([x], [t.view(1, 3, 1, 1)])
    p = s.softmax(0)
    assert row.item() == pytest.approx(-math.log(2 * p[0]))
    assert_close(torch.autograd.grad(row.sum(), x)[0].flatten(), (p - torch.tensor([0.5, 0.5, 0.0])).numpy(), rtol=1e-6)


def test_equal_networks_have_no_divergence_and_no_gradient():
    x = torch.linspace(-5, 5, 24).view(2, 3, 2, 2).requires_grad_()
    row = functional.logit_kl([x], [x.detach().clone()])
    assert row.tolist() == [[0.0, 0.0]]
    assert torch.autograd.grad(row.sum(), x)[0].abs().max() == 0


@options
def test_gradcheck(temperature, groups):
    s, t, weight = logit_support.given(6, [(2, 4, 2, 2), (2, 8, 1, 2)])
    x, y, w = cases.tensors(s, requires_grad=True), cases.tensors(t), cases.tensors(weight)
    assert torch.autograd.gradcheck(lambda *levels: functional.logit_kl(levels, y, w, temperature, groups), x)
    assert torch.autograd.gradgradcheck(lambda *levels: functional.logit_kl(levels, y, w, temperature, groups), x)


@given(shape=st.tuples(*[st.integers(1, high) for high in (3, 9, 5, 5)]), seed=st.integers(0, 99), groups=st.integers(1, 3), weighted=...)
def test_any_shape(shape, seed, groups, weighted: bool):
    n, bins, h, w = shape
    assert check("logit_kl", *logit_support.given(seed, [(n, bins * groups, h, w)], weighted), 1.5, groups).shape == (1, n)


def test_teacher_and_weight_are_constants():
    s, t, w = (cases.tensors(x, requires_grad=True) for x in logit_support.given(7))
    functional.logit_kl(s, t, w, 1.0, 2).sum().backward()
    assert all(x.grad is None for x in (*t, *w)) and all(x.grad is not None for x in s)


def test_empty():
    assert functional.logit_kl([], []).shape[0] == 0
    assert functional.logit_kl([torch.zeros(0, 3, 2, 2)], [torch.zeros(0, 3, 2, 2)], [torch.zeros(0, 2, 2)]).shape == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_shows_in_its_row_alone(bad, side):
    pair = [cases.tensors(x) for x in logit_support.given(8)[:2]]
    pair[side][1][0, 2, 1, 1] = bad
    for temperature, groups in OPTIONS:
        row = functional.logit_kl(*pair, None, temperature, groups)
        assert row.isfinite().tolist() == [[True, True], [False, True], [True, True]]


def test_what_does_not_fit_is_refused():
    x = [torch.zeros(1, 3, 2, 2)]
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        functional.logit_kl(x, x, None, 0.0)
    with pytest.raises(ValueError, match=r"groups must divide .* got 2 and \[0: \(1, 3, 2, 2\)\]"):
        functional.logit_kl(x, x, None, 1.0, 2)
    with pytest.raises(ValueError, match=r"1, 4, 2, 2"):
        functional.logit_kl(x, [torch.zeros(1, 4, 2, 2)])
    with pytest.raises(ValueError, match=r"weight has level shapes \[0: \(1, 3\)\]"):
        functional.logit_kl(x, x, [torch.zeros(1, 3)])
