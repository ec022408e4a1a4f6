"""`spatial_pool`: value and both gradients against the loops, maps without a sum, dtypes and layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, pixels
from oracle.compare import RTOL32, assert_close, assert_levels_close

from kdkernels import functional

NORMALIZERS = ["mean", "softmax"]


def _maps(seed, levels, signed=False):
    """Maps (N, H, W) that have a sum well away from 0."""
    made = cases.pyramid(seed, [(x.shape[0], *x.shape[2:]) for x in levels])
    return made if signed else [np.abs(a) for a in made]


def _check(levels, maps, normalize):
    x, a = cases.tensors(levels, requires_grad=True), cases.tensors(maps, requires_grad=True)
    got = functional.spatial_pool(x, a, normalize)
    assert_levels_close(got, [pixels.spatial_pool(*pair, normalize) for pair in zip(levels, maps, strict=True)])
    up = [np.random.RandomState(5).randn(*level.shape[:2]) for level in levels]
    gradients = torch.autograd.grad(sum((torch.tensor(u) * g).sum() for u, g in zip(up, got, strict=True)), [*x, *a])
    want = [pixels.spatial_pool_gradient(*three, u) for *three, u in zip(levels, maps, [normalize] * len(up), up, strict=True)]
    assert_levels_close(gradients[: len(x)], [dx for dx, _ in want], what="gradient of x, level")
    # Of one pixel the gradient is 0, and what the sums leave is not.
    assert_levels_close(gradients[len(x) :], [da for _, da in want], atol=1e-13, what="gradient of a, level")


@pytest.mark.parametrize("signed", [False, True], ids=["not negative", "signed"])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_value_and_gradients(normalize, signed):
    levels = cases.pyramid(1)
    _check(levels, _maps(2, levels, signed), normalize)
    assert functional.spatial_pool(cases.tensors(levels), cases.tensors(_maps(2, levels)))[0].shape == (2, 3)


def test_by_hand():
    x, a = torch.tensor([[[[1.0, 2.0]], [[10.0, -6.0]]]]), torch.tensor([[[1.0, 3.0]]])
    assert functional.spatial_pool([x], [a])[0].tolist() == [[1.75, -2.0]]
    (mean,) = functional.spatial_pool([x], [a.log()], "softmax")
    assert_close(mean, [[1.75, -2.0]], rtol=RTOL32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_without_a_sum_gives_zero_and_a_gradient_of_zero(dtype):
    x, a = torch.randn(3, 2, 1, 2, dtype=dtype, requires_grad=True), torch.tensor([[[0.0, 0.0]], [[1.0, -1.0]], [[0.0, 2.0]]], dtype=dtype)
    (mean,) = functional.spatial_pool([x], [a.requires_grad_()])
    assert mean[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert torch.equal(mean[2], x[2, :, 0, 1])
    for gradient in torch.autograd.grad(mean.square().sum(), [x, a]):
        assert not gradient[:2].any() and gradient[2].any()


def test_the_softmax_of_large_entries_does_not_overflow():
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert functional.spatial_pool([x], [torch.tensor([[[-1e5, 1e5, 0.0]]])], "softmax")[0].tolist() == [[2.0]]
    assert functional.spatial_pool([x], [torch.tensor([[[float("-inf"), 7.0, 7.0]]])], "softmax")[0].tolist() == [[2.5]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_nan_and_infinity_stay_non_finite(normalize, bad):
    levels = cases.pyramid(3)
    x, a = cases.tensors(levels), cases.tensors(_maps(4, levels))
    x[0][1, 2, 3, 4] = bad
    a[1][0] = 0
    x[1][0, 0, 0, 0] = bad
    got = functional.spatial_pool(x, a, normalize)
    # The second level's map is all 0.
    assert [int((~torch.isfinite(mean)).sum()) for mean in got] == [1, 1, 0]
    a[2][1, 0, 1] = abs(bad)
    assert not torch.isfinite(functional.spatial_pool(x, a, normalize)[2][1]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_16_bit_input_is_averaged_in_fp32(normalize, dtype):
    levels = [*cases.pyramid(5), np.ones((2, 1, 64, 80))]
    maps = [*_maps(6, levels[:-1]), np.ones((2, 64, 80))]
    held = cases.rounded(levels, dtype), cases.rounded(maps, dtype)
    want = [pixels.spatial_pool(*pair, normalize) for pair in zip(*held, strict=True)]
    for kind in (dtype, torch.float32):
        x, a = cases.tensors(levels, dtype, requires_grad=True), cases.tensors(held[1], kind, requires_grad=True)
        got = functional.spatial_pool(x, a, normalize)
        assert [g.dtype for g in got] == [torch.float32] * len(levels)
        assert_levels_close(got, want, rtol=RTOL32)
        gradients = torch.autograd.grad(sum(g.sum() for g in got), [*x, *a])
        assert [g.dtype for g in gradients] == [dtype] * len(x) + [kind] * len(a)
    assert functional.spatial_pool(x, [m.double() for m in a], normalize)[0].dtype == torch.float64


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_layouts(normalize):
    levels = cases.pyramid(7)
    maps = _maps(8, levels)
    want = [pixels.spatial_pool(*pair, normalize) for pair in zip(levels, maps, strict=True)]
    plain, a = cases.tensors(levels), cases.tensors(maps)
    last = [x.contiguous(memory_format=torch.channels_last) for x in plain]
    turned = [m.transpose(1, 2).contiguous().transpose(1, 2) for m in a]
    spread = [x.repeat_interleave(2, 3)[..., ::2] for x in plain]
    assert not any(x.is_contiguous() for x in spread)
    assert_levels_close(functional.spatial_pool(last, a, normalize), want)
    assert_levels_close(functional.spatial_pool(spread, turned, normalize), want)
    assert_levels_close(functional.spatial_pool(dict(zip("abc", plain, strict=True)), a, normalize), want)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_gradcheck(normalize):
    levels = cases.pyramid(9, [(2, 3, 2, 2), (2, 2, 1, 3)])
    inputs = cases.tensors([*levels, *_maps(10, levels)], requires_grad=True)

    def function(x, y, a, b):
        return tuple(functional.spatial_pool([x, y], [a, b], normalize))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@given(shape=st.tuples(*[st.integers(1, high) for high in (3, 5, 5, 5)]), seed=st.integers(0, 99), normalize=st.sampled_from(NORMALIZERS))
def test_any_shape(shape, seed, normalize):
    levels = cases.pyramid(seed, [shape])
    _check(levels, _maps(seed + 1, levels), normalize)
    assert functional.spatial_pool(levels := cases.tensors(levels), [x[:, 0].abs() for x in levels], normalize)[0].shape == shape[:2]


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_empty(normalize):
    assert functional.spatial_pool([], [], normalize) == []
    x, a = torch.zeros(0, 3, 2, 2, requires_grad=True), torch.zeros(0, 2, 2, requires_grad=True)
    (mean,) = functional.spatial_pool([x], [a], normalize)
    assert mean.shape == (0, 3)
    assert [g.shape for g in torch.autograd.grad(mean.sum(), [x, a])] == [x.shape, a.shape]


def test_what_does_not_fit_is_refused_with_both_shapes():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\).*\(2, 4, 5\)"):
        functional.spatial_pool([x], [torch.zeros(2, 5, 4)])
    with pytest.raises(ValueError, match=r"\[\], wanted \[p3: \(2, 4, 5\)\]"):
        functional.spatial_pool({"p3": x}, [])
    with pytest.raises(ValueError, match="median"):
        functional.spatial_pool([x], [torch.zeros(2, 4, 5)], "median")
