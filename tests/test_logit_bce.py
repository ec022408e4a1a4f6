"""`logit_bce`: value, gradient, dtypes, layouts and sure networks against the loops."""

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

BETAS = [0.0, 0.5, 1.0, 2.0]
weights = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@weights
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient(beta, weighted):
    rows = check("logit_bce", *logit_support.given(1, weighted=weighted), beta)
    assert rows.shape == (3, 2) and (rows >= 0).all()


def test_the_defaults_are_every_pixel_and_no_factor_and_that_is_torch_s():
    s, t = (cases.tensors(cases.pyramid(k)) for k in (1, 2))
    want = [F.binary_cross_entropy_with_logits(a, b.sigmoid(), reduction="none").sum((1, 2, 3)) for a, b in zip(s, t, strict=True)]
    got = functional.logit_bce(s, t)
    assert_close(got, torch.stack(want).numpy())
    # The cross-entropy is least where the student is the teacher, and not 0 there.
    assert (got > functional.logit_bce(t, t)).all() and (functional.logit_bce(t, t) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", BETAS)
def test_16_bit_input_is_computed_in_fp32(dtype, beta):
    assert check("logit_bce", *logit_support.given(2), beta, dtype=dtype).dtype == torch.float32


@pytest.mark.parametrize("anchors", [1, 3])
def test_logits_of_anchors_as_a_head_makes_them(anchors):
    """(N, A, K): a view as a pyramid, whose gradient has the view's strides."""
    s, t, weight = logit_support.given(3, [(2, 7, 5 * anchors, 1)])
    rows = check("logit_bce", s, t, weight, 1.0, laid_out=lambda x: x[..., 0].transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(3))
    assert rows.shape == (1, 2)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_sure_networks_keep_their_digits(beta):
    """Where both say 1 - 1e-6, the loss is of order 1e-6, and fp32 has it to all its digits."""
    s, t = ([np.abs(x) + 12 for x in cases.pyramid(seed)] for seed in (4, 5))
    assert (check("logit_bce", s, t, None, beta, dtype=torch.float32) < 1e-2).all()
    assert (check("logit_bce", [-x for x in s], [-x for x in t], None, beta, dtype=torch.float32) < 1e-2).all()


def test_large_logits():
    s, t = torch.tensor([1e4, -1e4, 1e4, -1e4]), torch.tensor([-1e4, 1e4, 1e4, -1e4])
    x = s.view(1, 4, 1, 1).requires_grad_()
    for beta in BETAS:
        row = functional.logit_bce([x], [t.view(1, 4, 1, 1)], None, beta)
        assert row.item() == 2e4
        assert torch.autograd.grad(row.sum(), x)[0].flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("beta", BETAS)
def test_equal_networks_have_no_gradient(beta):
    x = torch.linspace(-5, 5, 24, dtype=torch.float64).view(2, 3, 2, 2).requires_grad_()
    row = functional.logit_bce([x], [x.detach().clone()], None, beta)
    assert (row == 0).all() == (beta > 0)
    assert torch.autograd.grad(row.sum(), x)[0].abs().max() < 1e-15


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta):
    s, t, weight = logit_support.given(6, [(2, 3, 2, 2), (2, 1, 1, 3)])
    x, y, w = cases.tensors(s, requires_grad=True), cases.tensors(t), cases.tensors(weight)
    assert torch.autograd.gradcheck(lambda *levels: functional.logit_bce(levels, y, w, beta), x)
    assert torch.autograd.gradgradcheck(lambda *levels: functional.logit_bce(levels, y, w, beta), x)


@given(
    shape=st.tuples(*[st.integers(1, high) for high in (3, 9, 5, 5)]), seed=st.integers(0, 99), beta=st.sampled_from(BETAS), weighted=...
)
def test_any_shape(shape, seed, beta, weighted: bool):
    assert check("logit_bce", *logit_support.given(seed, [shape], weighted), beta).shape == (1, shape[0])


def test_teacher_and_weight_are_constants():
    s, t, w = (cases.tensors(x, requires_grad=True) for x in logit_support.given(7))
    functional.logit_bce(s, t, w, 1.0).sum().backward()
    assert all(x.grad is None for x in (*t, *w)) and all(x.grad is not None for x in s)


def test_empty():
    assert functional.logit_bce([], []).shape[0] == 0
    assert functional.logit_bce([torch.zeros(0, 3, 2, 2)], [torch.zeros(0, 3, 2, 2)], [torch.zeros(0, 2, 2)]).shape == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row_alone(bad):
    s, t, _ = (None if x is None else cases.tensors(x) for x in logit_support.given(8, weighted=False))
    s[1][0, 2, 1, 1] = bad
    for beta in BETAS:
        assert functional.logit_bce(s, t, None, beta).isfinite().tolist() == [[True, True], [False, True], [True, True]]


def test_what_does_not_fit_is_refused():
    x = [torch.zeros(1, 3, 2, 2)]
    with pytest.raises(ValueError, match="beta must be at least 0; got -1"):
        functional.logit_bce(x, x, None, -1.0)
    with pytest.raises(ValueError, match=r"1, 4, 2, 2"):
        functional.logit_bce(x, [torch.zeros(1, 4, 2, 2)])
    with pytest.raises(ValueError, match=r"weight has level shapes \[0: \(1, 3\)\]"):
        functional.logit_bce(x, x, [torch.zeros(1, 3)])
