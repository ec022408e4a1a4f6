"""`channel_mean`: value, gradient, dtypes and layouts against the loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, primitives
from oracle.compare import RTOL32, assert_close, assert_levels_close

from kdkernels import functional

MODES = ["signed", "abs"]


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient(mode):
    levels = cases.pyramid(1)
    x = cases.tensors(levels, requires_grad=True)
    got = functional.channel_mean(x, mode)
    up = [np.random.RandomState(5).randn(*level.shape[:2]) for level in levels]
    assert_levels_close(got, [primitives.channel_mean(level, mode) for level in levels])
    gradients = torch.autograd.grad(sum((torch.tensor(u) * g).sum() for u, g in zip(up, got, strict=True)), x)
    assert_levels_close(gradients, [primitives.channel_mean_gradient(level, mode, u) for level, u in zip(levels, up, strict=True)])


def test_signed_is_the_default_and_keeps_cancellation():
    x = torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]]])
    assert functional.channel_mean([x])[0].item() == 0.0
    assert functional.channel_mean([x], "abs")[0].item() == 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_16_bit_input_is_averaged_in_fp32(dtype, mode):
    # 2048 ones in fp16 already stop a 16-bit sum from growing by 1: the mean is right only when it is accumulated in fp32.
    levels = [*cases.pyramid(2), np.ones((2, 1, 64, 80))]
    got = functional.channel_mean(cases.tensors(levels, dtype), mode)
    assert [g.dtype for g in got] == [torch.float32] * len(levels)
    assert_levels_close(got, [primitives.channel_mean(level, mode) for level in cases.rounded(levels, dtype)], rtol=RTOL32)
    assert got[-1].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode):
    levels = cases.pyramid(3)
    want = [primitives.channel_mean(level, mode) for level in levels]
    plain = cases.tensors(levels)
    assert_levels_close(functional.channel_mean([x.contiguous(memory_format=torch.channels_last) for x in plain], mode), want)
    assert_levels_close(functional.channel_mean([x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain], mode), want)
    assert_levels_close(functional.channel_mean(dict(zip("abc", plain, strict=True)), mode), want)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    x = cases.tensors(cases.pyramid(4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *levels: functional.channel_mean(levels, mode), x)
    assert torch.autograd.gradgradcheck(lambda *levels: functional.channel_mean([level**2 for level in levels], mode), x)


@given(shape=st.tuples(*[st.integers(1, high) for high in (3, 5, 7, 7)]), seed=st.integers(0, 99), mode=st.sampled_from(MODES))
def test_any_shape(shape, seed, mode):
    level = cases.pyramid(seed, [shape])[0]
    assert_close(functional.channel_mean([torch.tensor(level)], mode)[0], primitives.channel_mean(level, mode))


@pytest.mark.parametrize("mode", MODES)
def test_empty(mode):
    assert functional.channel_mean([], mode) == []
    assert functional.channel_mean([torch.zeros(0, 3, 2, 2)], mode)[0].shape == (0, 3)


def test_unknown_mode_and_wrong_rank_are_named():
    with pytest.raises(ValueError, match="median"):
        functional.channel_mean([torch.zeros(1, 1, 2, 2)], "median")
    with pytest.raises(ValueError, match=r"3, 4, 5"):
        functional.channel_mean([torch.zeros(3, 4, 5)])
