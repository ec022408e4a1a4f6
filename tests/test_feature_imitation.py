"""`feature_imitation`: value and both gradients against the loops, with and without each factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, primitives
from oracle.compare import RTOL32, RTOL64, assert_close

from kdkernels import functional

FACTORS = [(False, False), (True, False), (False, True), (True, True)]
IDS = ["plain", "spatial", "channel", "both"]


def _case(seed, shapes=cases.SHAPES, spatial=True, channel=True):
    s, t, a, b = cases.four(seed, shapes)
    return s, t, [np.abs(x[:, 0]) for x in a] if spatial else None, [np.abs(x[:, :, 0, 0]) for x in b] if channel else None


def _maybe(levels, dtype=torch.float64):
    return None if levels is None else cases.tensors(levels, dtype)


def _at(levels, level):
    return None if levels is None else levels[level]


def _check(s, t, spatial, channel, rtol=RTOL64):
    x, y = cases.tensors(s, requires_grad=True), cases.tensors(t, requires_grad=True)
    got = functional.feature_imitation(x, y, _maybe(spatial), _maybe(channel))
    up = cases.upstream(0, *got.shape)
    want = np.stack([primitives.feature_imitation(s[i], t[i], _at(spatial, i), _at(channel, i)) for i in range(len(s))])
    assert_close(got, want, rtol, what="(level, image)")
    gradients = torch.autograd.grad((got * torch.tensor(up)).sum(), [*x, *y])
    for i in range(len(s)):
        gradient = primitives.feature_imitation_gradient(s[i], t[i], _at(spatial, i), _at(channel, i), up[i])
        assert_close(gradients[i], gradient, rtol, what=f"gradient to s, level {i}")
        assert_close(gradients[len(s) + i], -gradient, rtol, what=f"gradient to t, level {i}")


@pytest.mark.parametrize(("spatial", "channel"), FACTORS, ids=IDS)
def test_value_and_gradients(spatial, channel):
    _check(*_case(1, spatial=spatial, channel=channel))


@pytest.mark.parametrize(("spatial", "channel"), FACTORS, ids=IDS)
def test_levels_are_independent(spatial, channel):
    s, t, a, b = _case(2, spatial=spatial, channel=channel)
    x = cases.tensors(s, requires_grad=True)
    got = functional.feature_imitation(x, cases.tensors(t), _maybe(a), _maybe(b))
    for level in range(len(s)):
        gradients = torch.autograd.grad(got[level].sum(), x, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().max() > 0) for g in gradients] == [i == level for i in range(len(s))]


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)], ids=str
)
def test_mixed_16_bit_inputs_are_computed_in_fp32(dtypes):
    s, t, a, b = _case(3)
    got = functional.feature_imitation(
        cases.tensors(s, dtypes[0]), cases.tensors(t, dtypes[1]), _maybe(a, torch.float32), _maybe(b, torch.float32)
    )
    held = cases.rounded(s, dtypes[0]), cases.rounded(t, dtypes[1]), cases.rounded(a, torch.float32), cases.rounded(b, torch.float32)
    assert got.dtype == torch.float32
    assert_close(got, np.stack([primitives.feature_imitation(*level) for level in zip(*held, strict=True)]), rtol=RTOL32)


def test_differences_of_large_16_bit_numbers_do_not_overflow():
    s, t = torch.full((1, 2, 2, 2), 60000.0).half(), torch.full((1, 2, 2, 2), -60000.0).half()
    assert functional.feature_imitation([s], [t]).item() == pytest.approx(8 * (2 * 59999.99) ** 2, rel=1e-3)


@pytest.mark.parametrize("channel", [False, True])
def test_several_spatial_weights_share_the_pass(channel):
    s, t, _, b = _case(6, channel=channel)
    masks = [[np.abs(level[:, 0]) for level in cases.pyramid(60 + k)] for k in range(3)]
    x = cases.tensors(s, requires_grad=True)
    stacked = [torch.tensor(np.stack(level, axis=1)) for level in zip(*masks, strict=True)]
    got = functional.feature_imitation(x, cases.tensors(t), stacked, _maybe(b))
    assert got.shape == (3, 2, 3)
    for k, mask in enumerate(masks):
        want = np.stack([primitives.feature_imitation(s[i], t[i], mask[i], _at(b, i)) for i in range(3)])
        assert_close(got[..., k], want, what=f"weight {k}")
        up = cases.upstream(k, 3, 2)
        gradients = torch.autograd.grad((got[..., k] * torch.tensor(up)).sum(), x, retain_graph=True)
        for i in range(3):
            want = primitives.feature_imitation_gradient(s[i], t[i], mask[i], _at(b, i), up[i])
            assert_close(gradients[i], want, what=f"weight {k}: gradient of level {i}")


def test_layouts():
    s, t, a, b = _case(4)
    x = [level.contiguous(memory_format=torch.channels_last) for level in cases.tensors(s)]
    got = functional.feature_imitation(dict(enumerate(x)), dict(enumerate(cases.tensors(t))), _maybe(a), _maybe(b))
    assert_close(got, np.stack([primitives.feature_imitation(*level) for level in zip(s, t, a, b, strict=True)]))


def test_gradcheck():
    s, t, a, b = _case(5, [(2, 2, 2, 3), (2, 3, 1, 2)])
    factors = _maybe(a), _maybe(b)
    inputs = cases.tensors(s + t, requires_grad=True)

    def function(s0, s1, t0, t1):
        return functional.feature_imitation([s0, s1], [t0, t1], *factors)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@given(shape=st.tuples(*[st.integers(1, high) for high in (3, 5, 6, 6)]), seed=st.integers(0, 99), factors=st.sampled_from(FACTORS))
def test_any_shape(shape, seed, factors):
    _check(*_case(seed, [shape], *factors))


def test_empty():
    assert functional.feature_imitation([], []).shape[0] == 0
    assert functional.feature_imitation([torch.zeros(0, 3, 2, 2)], [torch.zeros(0, 3, 2, 2)]).shape == (1, 0)


def test_shapes_that_do_not_fit_are_refused_with_both_sides_levels():
    a, b = [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)], [torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 2, 2)]
    with pytest.raises(ValueError, match=r"(?s)(1, 3, 2, 2).*(1, 5, 2, 2)"):
        functional.feature_imitation(a, b)
    with pytest.raises(ValueError, match=r"1, 3, 4, 4"):
        functional.feature_imitation(a, b[:1])
    with pytest.raises(ValueError, match=r"1, 4"):
        functional.feature_imitation(a, a, None, [torch.zeros(1, 4), torch.zeros(1, 3)])
