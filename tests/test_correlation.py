"""`correlation`: value, shares, gradient, dtypes and large means against the loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, numeric, rows
from oracle.compare import RTOL32, RTOL64, assert_close, assert_levels_close

from kdkernels import functional

EPS = 1e-6


def check(s, t, eps=EPS, seed=0, dtype=torch.float64, rtol=RTOL64):
    x = cases.tensors(s, dtype, requires_grad=True)
    got = functional.correlation(x, cases.tensors(t, dtype), eps)
    up = cases.upstream(seed, len(s), s[0].shape[0])
    held_s, held_t = cases.rounded(s, dtype), cases.rounded(t, dtype)
    want = [rows.correlation(a, b, eps) for a, b in zip(held_s, held_t, strict=True)]
    assert_levels_close(list(got), want, rtol)
    # Of each row the share is a constant, so that a level's rows enter as one factor of its V.
    factors = [float((u * row).sum() / row.sum()) for u, row in zip(up, want, strict=True)]
    gradients = torch.autograd.grad((torch.tensor(up) * got).sum(), x)
    slopes = [rows.correlation_gradient(a, b, eps, f) for a, b, f in zip(held_s, held_t, factors, strict=True)]
    assert_levels_close(gradients, slopes, {torch.float16: 1e-3, torch.bfloat16: 4e-3}.get(dtype, rtol))
    return got


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_value_and_gradient(eps):
    got = check(cases.pyramid(1), cases.pyramid(2), eps)
    assert got.shape == (3, 2) and (got > 0).all()


def test_the_loops_gradient_is_that_of_their_value():
    s, t = cases.pyramid(1)[2], cases.pyramid(2)[2]
    want = numeric.gradient(lambda x: 1.3 * rows.correlation(x, t, 0.1).sum(), s)
    got = rows.correlation_gradient(s, t, 0.1, 1.3)
    assert_close(got, want, rtol=1e-9)
    # A constant added to a channel changes nothing.
    assert np.abs(got.sum((0, 2, 3))).max() < 1e-12 * np.abs(got).sum()


def test_a_level_s_sum_is_one_minus_pearson_s_r():
    s, t = (cases.tensors(cases.pyramid(k))[0] for k in (3, 4))
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(s.unbind(1), t.unbind(1), strict=True)]
    count = s[:, 0].numel()
    r = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean()
    total = functional.correlation([s], [t], 1e-12).sum()
    # The deviations divide by count - 1, the mean by count.
    assert_close(total, (1 - r) * (count - 1) / count, rtol=1e-9)
    assert 0 < total < 2


def test_scale_and_offset_of_a_channel_change_nothing():
    s, t = (cases.tensors(cases.pyramid(k))[0] for k in (5, 6))
    moved = s * torch.tensor([2.0, 0.5, 9.0]).double()[None, :, None, None] + 40
    assert_close(functional.correlation([moved], [t], 1e-14), functional.correlation([s], [t], 1e-14))
    x = s.float()
    assert functional.correlation([x], [x]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_input_is_computed_in_fp32(dtype):
    got = check(cases.pyramid(7), cases.pyramid(8), dtype=dtype, rtol=RTOL32)
    assert got.dtype == torch.float32


def test_means_far_above_the_deviations():
    s, t = ([level + offset for level in cases.pyramid(k)] for k, offset in ((9, 1e4), (10, -3e3)))
    got = check(s, t, dtype=torch.float32, rtol=RTOL32)
    assert (got > 0).all()


def test_a_constant_channel_has_no_deviation():
    s, t = cases.pyramid(11, [(2, 2, 3, 2)]), cases.pyramid(12, [(2, 2, 3, 2)])
    s[0][:, 1] = 3.0
    assert check(s, t, 0.1).isfinite().all()


def test_gradcheck():
    s, t = cases.tensors(cases.pyramid(15), requires_grad=True), cases.tensors(cases.pyramid(16))
    # Of the levels' sums: a single row's share is a constant for autograd, not for differences.
    assert torch.autograd.gradcheck(lambda *x: functional.correlation(x, t, 0.1).sum(1), s)
    assert torch.autograd.gradgradcheck(lambda *x: functional.correlation(x, t, 0.1).sum(1), s)


@given(shape=st.tuples(*[st.integers(1, high) for high in (3, 4, 5, 5)]), seed=st.integers(0, 99))
def test_any_shape(shape, seed):
    s, t = cases.pyramid(seed, [shape]), cases.pyramid(seed + 100, [shape])
    got = functional.correlation(cases.tensors(s), cases.tensors(t))
    assert_close(got[0], rows.correlation(s[0], t[0], EPS))
    assert got.shape == (1, shape[0]) and 0 <= got.sum() < 2


def test_one_value_a_channel_and_no_image():
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    value = functional.correlation([x], [torch.randn(1, 3, 1, 1)])
    value.sum().backward()
    assert value.tolist() == [[0.0]] and x.grad.abs().sum() == 0
    assert functional.correlation([], []).shape == (0, 0)
    empty = torch.zeros(0, 3, 2, 2, requires_grad=True)
    value = functional.correlation([empty], [empty.detach()])
    value.sum().backward()
    assert value.shape == (1, 0) and empty.grad.shape == empty.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_what_is_not_finite_stays_so(bad, of_teacher):
    s, t = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    (t if of_teacher else s)[1, 0, 2, 1] = bad
    # The statistics are the batch's, so that no image stays clean.
    assert not functional.correlation([s], [t]).isfinite().any()


def test_images_that_are_equally_far_share_equally():
    x = torch.randn(1, 2, 3, 3).double()
    s, t = torch.cat([x, x]), torch.cat([x.flip(3), x.flip(3)])
    got = functional.correlation([s], [t])
    assert_close(got[0, 0], got[0, 1], rtol=1e-14)
    assert_close(got.sum(), np.asarray(rows.correlation(s.numpy(), t.numpy(), EPS).sum()))
    assert (got > 0).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="eps must be above 0; got 0"):
        functional.correlation([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)], 0.0)
    with pytest.raises(ValueError, match=r"s has shape \(1, 1, 2, 2\), t has shape \(1, 2, 2, 2\)"):
        functional.correlation([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 2, 2, 2)])
