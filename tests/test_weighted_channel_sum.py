"""`weighted_channel_sum`: map, minimum, maximum and all gradients against the loops, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, primitives
from oracle.compare import RTOL32, assert_close, assert_levels_close

from kdkernels import functional

ACTIVATIONS, RECTIFY = ["raw", "abs"], ["abs", "relu", "none"]


def _weights(seed: int, levels, elementwise: bool) -> list[np.ndarray]:
    full = cases.pyramid(seed, [level.shape for level in levels])
    return full if elementwise else [level[:, :, 0, 0].copy() for level in full]


def _both(levels, weights, activation, rectify, seed=0):
    """(library values, library gradients to x and w), (loop values, loop gradients) for random upstream gradients of r, min and max."""
    x, w = cases.tensors(levels, requires_grad=True), cases.tensors(weights, requires_grad=True)
    maps, low, high = functional.weighted_channel_sum(x, w, activation, rectify)
    rng = np.random.RandomState(seed)
    total, want_values, want_dx, want_dw = 0.0, [], [], []
    for level in range(len(levels)):
        want = primitives.weighted_channel_sum(levels[level], weights[level], activation, rectify)
        up = [rng.randn(*part.shape) for part in want]
        got = maps[level], low[level], high[level]
        total = total + sum((torch.tensor(u) * g).sum() for u, g in zip(up, got, strict=True))
        gradients = primitives.weighted_channel_sum_gradient(levels[level], weights[level], activation, rectify, *up)
        want_values.append(want)
        want_dx.append(gradients[0])
        want_dw.append(gradients[1])
    got = torch.autograd.grad(total, [*x, *w])
    return (list(zip(maps, low, high, strict=True)), got[: len(x)], got[len(x) :]), (want_values, want_dx, want_dw)


@pytest.mark.parametrize("elementwise", [False, True], ids=["per channel", "per element"])
@pytest.mark.parametrize("rectify", RECTIFY)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, rectify, elementwise):
    levels = cases.pyramid(1)
    got, want = _both(levels, _weights(2, levels, elementwise), activation, rectify)
    for level, parts in enumerate(got[0]):
        assert_levels_close(parts, want[0][level], what=f"level {level}: map, minimum, maximum")
    assert_levels_close(got[1], want[1], what="gradient to x, level")
    assert_levels_close(got[2], want[2], what="gradient to w, level")


@pytest.mark.parametrize("rectify", RECTIFY)
def test_exact_ties_share_the_gradient_of_the_extrema(rectify):
    # Small integers, so that equal sums are equal exactly: r has two minima and three maxima.
    level = np.array([[[[1.0, 4.0, 2.0], [1.0, 4.0, 3.0]], [[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]]]])
    got, want = _both([level], [np.array([[2.0, 1.0]])], "raw", rectify)
    assert want[0][0][1] == 3.0
    assert want[0][0][2] == 7.0
    assert_close(got[1][0], want[1][0], what="gradient to x")


def test_rectify_relu_and_abs_differ_where_the_sum_is_negative():
    x, w = [torch.tensor([[[[1.0, -2.0]]]])], [torch.tensor([[3.0]])]
    assert functional.weighted_channel_sum(x, w, "raw", "abs")[0][0].tolist() == [[[3.0, 6.0]]]
    assert functional.weighted_channel_sum(x, w, "raw", "relu")[0][0].tolist() == [[[3.0, 0.0]]]
    assert functional.weighted_channel_sum(x, w, "raw", "none")[0][0].tolist() == [[[3.0, -6.0]]]
    assert functional.weighted_channel_sum(x, w, "abs", "none")[0][0].tolist() == [[[3.0, 6.0]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rectify", RECTIFY)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay_non_finite(activation, rectify, bad):
    # Infinite weights are what a GradScaler's overflowing step brings; relu must not turn a sum of -inf into an innocent 0.
    levels = cases.tensors(cases.pyramid(11))
    weights = cases.tensors(_weights(12, levels, False))
    features, channels = [x.clone() for x in levels], [w.clone() for w in weights]
    features[0][1, 2, 3, 4] = bad
    channels[0][1, 2] = bad
    maps, low, high = functional.weighted_channel_sum(features, weights, activation, rectify)
    assert [int((~torch.isfinite(m)).sum()) for m in maps] == [1, 0, 0]
    assert not (torch.isfinite(low[0][1]) and torch.isfinite(high[0][1]))
    maps, low, high = functional.weighted_channel_sum(levels, channels, activation, rectify)
    assert [int((~torch.isfinite(m)).sum()) for m in maps] == [30, 0, 0]
    assert not (torch.isfinite(low[0][1]) and torch.isfinite(high[0][1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_input_is_summed_in_fp32(dtype):
    levels = cases.pyramid(3)
    weights = _weights(4, levels, False)
    got = functional.weighted_channel_sum(cases.tensors(levels, dtype), cases.tensors(weights, torch.float32), "raw", "abs")
    held = cases.rounded(levels, dtype), cases.rounded(weights, torch.float32)
    for level in range(len(levels)):
        parts = [part[level] for part in got]
        assert [part.dtype for part in parts] == [torch.float32] * 3
        assert_levels_close(parts, primitives.weighted_channel_sum(held[0][level], held[1][level], "raw", "abs"), rtol=RTOL32)


def test_gradient_to_16_bit_features_has_their_dtype():
    levels = cases.pyramid(5)
    x = cases.tensors(levels, torch.bfloat16, requires_grad=True)
    weights = _weights(6, levels, False)
    maps, _, _ = functional.weighted_channel_sum(x, cases.tensors(weights, torch.float32), "abs", "relu")
    gradients = torch.autograd.grad(sum(m.sum() for m in maps), x)
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    for level, got in enumerate(gradients):
        held = cases.rounded([levels[level]], torch.bfloat16)[0]
        up = np.ones(held.shape[:1] + held.shape[2:])
        want = primitives.weighted_channel_sum_gradient(held, cases.rounded(weights, torch.float32)[level], "abs", "relu", up)[0]
        assert_close(got, want, rtol=2**-8, what=f"level {level}")  # bf16 holds 8 bits: half a unit is 2^-9 of the value


def test_layouts():
    levels = cases.pyramid(7)
    weights = _weights(8, levels, False)
    x = [level.contiguous(memory_format=torch.channels_last) for level in cases.tensors(levels)]
    maps, low, high = functional.weighted_channel_sum(x, cases.tensors(weights))
    for level in range(len(levels)):
        want = primitives.weighted_channel_sum(levels[level], weights[level], "raw", "abs")
        assert_levels_close([maps[level], low[level], high[level]], want)


@pytest.mark.parametrize("elementwise", [False, True], ids=["per channel", "per element"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, elementwise):
    levels = cases.pyramid(9, [(2, 3, 3, 2), (2, 2, 2, 2)])
    inputs = cases.tensors(levels + _weights(10, levels, elementwise), requires_grad=True)

    def function(a, b, u, v):
        maps, low, high = functional.weighted_channel_sum([a, b], [u, v], activation, "abs")
        return (*maps, *low, *high)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@given(shape=st.tuples(*[st.integers(1, high) for high in (3, 4, 5, 5)]), seed=st.integers(0, 99), rectify=st.sampled_from(RECTIFY))
def test_any_shape(shape, seed, rectify):
    levels = cases.pyramid(seed, [shape])
    got, want = _both(levels, _weights(seed + 1, levels, False), "raw", rectify, seed)
    assert_levels_close(got[0][0], want[0][0])
    assert_close(got[1][0], want[1][0])


def test_weights_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"(?s)(2, 4).*(2, 3)|(2, 3).*(2, 4)"):
        functional.weighted_channel_sum([torch.zeros(2, 3, 2, 2)], [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="sigmoid"):
        functional.weighted_channel_sum([torch.zeros(2, 3, 2, 2)], [torch.zeros(2, 3)], "sigmoid")
    with pytest.raises(ValueError, match="gelu"):
        functional.weighted_channel_sum([torch.zeros(2, 3, 2, 2)], [torch.zeros(2, 3)], "raw", "gelu")
