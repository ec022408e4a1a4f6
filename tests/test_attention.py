"""`attention`: both maps and their gradient against the loops, saturation, dtypes and layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, primitives
from oracle.compare import RTOL32, assert_close, assert_levels_close

from kdkernels import functional

TEMPERATURES = [0.1, 0.5, 2.0]


def _check(levels, temperature, which=("spatial", "channel")):
    x = cases.tensors(levels, requires_grad=True)
    spatial, channel = functional.attention(x, temperature)
    rng = np.random.RandomState(0)
    total, want_gradients = 0.0, []
    for level, values in enumerate(levels):
        want = primitives.attention(values, temperature)
        assert_levels_close([spatial[level], channel[level]], want, what=f"level {level}: spatial, channel")
        u = rng.randn(*want[0].shape) * ("spatial" in which)
        v = rng.randn(*want[1].shape) * ("channel" in which)
        total = total + (torch.tensor(u) * spatial[level]).sum() + (torch.tensor(v) * channel[level]).sum()
        want_gradients.append(primitives.attention_gradient(values, temperature, u, v))
    for level, gradient in enumerate(torch.autograd.grad(total, x)):
        assert_close(gradient, want_gradients[level], atol=1e-13, what=f"gradient of level {level}")


@pytest.mark.parametrize("which", [("spatial",), ("channel",), ("spatial", "channel")], ids="+".join)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_values_and_gradient(temperature, which):
    _check(cases.pyramid(1), temperature, which)


def test_both_have_mean_one():
    spatial, channel = functional.attention(cases.tensors(cases.pyramid(2)))
    for s, c in zip(spatial, channel, strict=True):
        assert_close(s.mean((1, 2)), np.ones(2))
        assert_close(c.mean(1), np.ones(2))


def test_the_default_temperature_is_half():
    level = cases.pyramid(3)[0]
    want = primitives.attention(level, 0.5)
    assert_levels_close([part[0] for part in functional.attention([torch.tensor(level)])], want)


def test_a_single_cell_and_a_single_channel_get_all_the_attention():
    spatial, channel = functional.attention([torch.randn(2, 1, 1, 1, dtype=torch.float64)])
    assert spatial[0].tolist() == [[[1.0]], [[1.0]]]
    assert channel[0].tolist() == [[1.0], [1.0]]
    _check(cases.pyramid(4, [(2, 1, 1, 1), (2, 1, 3, 2), (2, 3, 1, 1)]), 0.5)


def test_constant_features_give_one_everywhere():
    spatial, channel = functional.attention([torch.full((1, 3, 2, 2), -4.0)])
    assert spatial[0].unique().tolist() == [1.0]
    assert channel[0].unique().tolist() == [1.0]


def test_large_features_saturate_without_overflow():
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1, 1, 0] = 60000.0
    spatial, channel = functional.attention([x.half(), x], 0.5)
    for s, c in zip(spatial, channel, strict=True):
        assert s.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
        assert c.tolist() == [[0.0, 2.0]]


def test_the_gradient_is_zero_where_a_feature_is_zero():
    level = cases.pyramid(5, [(1, 2, 2, 2)])[0]
    level[0, 0, 1, 1] = 0.0
    _check([level], 0.5)
    x = torch.tensor(level, requires_grad=True)
    (gradient,) = torch.autograd.grad(functional.attention([x])[0][0][0, 1, 1], x)
    assert gradient[0, 0, 1, 1] == 0
    assert gradient[0, 1, 1, 1] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_input_is_computed_in_fp32(dtype):
    levels = cases.pyramid(6)
    spatial, channel = functional.attention(cases.tensors(levels, dtype))
    for level, held in enumerate(cases.rounded(levels, dtype)):
        assert spatial[level].dtype == channel[level].dtype == torch.float32
        assert_levels_close([spatial[level], channel[level]], primitives.attention(held, 0.5), rtol=RTOL32)


def test_layouts():
    levels = cases.pyramid(7)
    x = [level.contiguous(memory_format=torch.channels_last) for level in cases.tensors(levels)]
    spatial, channel = functional.attention(x)
    for level, values in enumerate(levels):
        assert_levels_close([spatial[level], channel[level]], primitives.attention(values, 0.5))


def test_gradcheck():
    x = cases.tensors(cases.pyramid(8, [(2, 3, 2, 2), (2, 2, 1, 3)]), requires_grad=True)

    def function(a, b):
        spatial, channel = functional.attention([a, b], 0.5)
        return (*spatial, *channel)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@given(
    shape=st.tuples(*[st.integers(1, high) for high in (3, 5, 5, 5)]), seed=st.integers(0, 99), temperature=st.sampled_from(TEMPERATURES)
)
def test_any_shape(shape, seed, temperature):
    _check(cases.pyramid(seed, [shape]), temperature)


def test_empty():
    assert functional.attention([]) == ([], [])
    spatial, channel = functional.attention([torch.zeros(0, 3, 2, 2)])
    assert (spatial[0].shape, channel[0].shape) == ((0, 2, 2), (0, 3))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        functional.attention([torch.zeros(1, 1, 2, 2)], temperature)
