"""`channel_kl`: value, gradient, dtypes and large logits against the loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, rows
from oracle.compare import RTOL32, RTOL64, assert_close, assert_levels_close
from torch.nn import functional as F

from kdkernels import functional

TEMPERATURES = [0.5, 1.0, 4.0]
entropies = pytest.mark.parametrize("entropy", [True, False], ids=["kl", "cross_entropy"])


def check(s, t, temperature=1.0, entropy=True, seed=0, dtype=torch.float64, rtol=RTOL64):
    x = cases.tensors(s, dtype, requires_grad=True)
    got = functional.channel_kl(x, cases.tensors(t, dtype), temperature, entropy)
    up = cases.upstream(seed, len(s), s[0].shape[0])
    held_s, held_t = cases.rounded(s, dtype), cases.rounded(t, dtype)
    assert_levels_close(list(got), [rows.channel_kl(a, b, temperature, entropy) for a, b in zip(held_s, held_t, strict=True)], rtol)
    gradients = torch.autograd.grad((torch.tensor(up) * got).sum(), x)
    want = [rows.channel_kl_gradient(a, b, temperature, u) for a, b, u in zip(held_s, held_t, up, strict=True)]
    unit = {torch.float16: 1e-3, torch.bfloat16: 4e-3}.get(dtype, rtol)
    assert_levels_close(gradients, want, unit, atol=1e-16)
    return got


@entropies
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_and_gradient(temperature, entropy):
    got = check(cases.pyramid(1), cases.pyramid(2), temperature, entropy)
    assert got.shape == (3, 2) and (got > 0).all()


def test_the_defaults_are_temperature_1_and_the_divergence():
    s, t = (cases.tensors(cases.pyramid(k)) for k in (1, 2))
    assert torch.equal(functional.channel_kl(s, t), functional.channel_kl(s, t, 1.0, True))


def test_it_is_what_torch_has_for_two_distributions():
    s, t = (cases.tensors(cases.pyramid(k))[0] for k in (3, 4))
    log_q, p = (s / 2).flatten(2).log_softmax(2), (t / 2).flatten(2).softmax(2)
    divergence, cross_entropy = (functional.channel_kl([s], [t], 2.0, entropy)[0].sum() for entropy in (True, False))
    assert_close(divergence, F.kl_div(log_q, p, reduction="sum"))
    assert_close(cross_entropy, -(p * log_q).sum())
    assert cross_entropy > divergence > 0


def test_equal_features_have_no_divergence_and_the_entropy():
    x = torch.zeros(2, 3, 4, 5)
    assert functional.channel_kl([x], [x]).tolist() == [[0.0, 0.0]]
    assert_close(functional.channel_kl([x + 7], [x], entropy=False), np.full((1, 2), 3 * math.log(20)), RTOL32)


def test_a_constant_added_to_a_channel_changes_nothing():
    s, t = (cases.tensors(cases.pyramid(k))[0] for k in (5, 6))
    moved = s + torch.tensor([100.0, -50.0, 3.0]).double()[None, :, None, None]
    got = functional.channel_kl([moved], [t])
    assert_close(got, functional.channel_kl([s], [t]), rtol=1e-12)
    assert (got > 0).all()


@entropies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_input_is_computed_in_fp32(dtype, entropy):
    got = check(cases.pyramid(7), cases.pyramid(8), 1.0, entropy, dtype=dtype, rtol=RTOL32)
    assert got.dtype == torch.float32


@entropies
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_of_1e4(offset, entropy):
    s, t = ([level + offset for level in cases.pyramid(k)] for k in (9, 10))
    got = check(s, t, 2.0, entropy, dtype=torch.float32, rtol=RTOL32)
    assert (got > 0).all()


def test_peaks_of_1e4_saturate():
    s, t = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    s[..., 0, 0], t[..., 1, 1] = 1e4, 1e4
    x = s.clone().requires_grad_()
    value = functional.channel_kl([x], [t])
    value.sum().backward()
    assert value.tolist() == [[1e4]]
    assert x.grad.tolist() == [[[[1.0, 0.0], [0.0, -1.0]]]]


@entropies
def test_gradcheck(entropy):
    s, t = cases.tensors(cases.pyramid(13), requires_grad=True), cases.tensors(cases.pyramid(14))
    assert torch.autograd.gradcheck(lambda *x: functional.channel_kl(x, t, 0.7, entropy), s)
    assert torch.autograd.gradgradcheck(lambda *x: functional.channel_kl(x, t, 0.7, entropy), s)


@given(
    shape=st.tuples(*[st.integers(1, high) for high in (3, 4, 5, 5)]),
    seed=st.integers(0, 99),
    temperature=st.sampled_from(TEMPERATURES),
    entropy=st.booleans(),
)
def test_any_shape(shape, seed, temperature, entropy):
    s, t = cases.pyramid(seed, [shape]), cases.pyramid(seed + 100, [shape])
    got = functional.channel_kl(cases.tensors(s), cases.tensors(t), temperature, entropy)
    assert_close(got[0], rows.channel_kl(s[0], t[0], temperature, entropy), atol=1e-15)
    assert got.shape == (1, shape[0]) and (got > -1e-12).all()


def test_one_pixel_and_no_image():
    x = torch.randn(2, 3, 1, 1)
    assert functional.channel_kl([x], [2 * x]).tolist() == [[0.0, 0.0]]
    assert functional.channel_kl([], []).shape == (0, 0)
    empty = torch.zeros(0, 3, 2, 2, requires_grad=True)
    value = functional.channel_kl([empty], [empty.detach()])
    value.sum().backward()
    assert value.shape == (1, 0) and empty.grad.shape == empty.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_what_is_not_finite_stays_so_and_in_its_image(bad, of_teacher):
    s, t = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    (t if of_teacher else s)[1, 0, 2, 1] = bad
    assert functional.channel_kl([s], [t]).isfinite().tolist() == [[True, False]]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        functional.channel_kl([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)], 0.0)
    with pytest.raises(ValueError, match=r"s has shape \(1, 1, 2, 2\), t has shape \(1, 2, 2, 2\)"):
        functional.channel_kl([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 2, 2, 2)])
