"""`channel_mean` by fused kernels against the reference in float64: value, gradient, and what the operator tells torch of both."""

from __future__ import annotations

import pytest
import torch
from all_kernels import on_all_kernels, poisoned
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from triton_support import ROUNDING

from kdkernels import backend as backends
from kdkernels import functional
from kdkernels.ops.channel_mean import MODES, fused
from kdkernels.pyramid import pack
from kdkernels.reference.channel_mean import channel_mean as reference

SHAPES = [(2, 20, 14, 19), (2, 3, 7, 11), (2, 16, 4, 8), (2, 1, 1, 1)]


def _both(backend, x, mode, seed=9):
    """(means, gradients) of x by the kernels, through autograd, and of the reference in float64."""
    results = []
    for function, levels in ((lambda *a: fused(backend, *a), [a.detach() for a in x]), (reference, [a.detach().double() for a in x])):
        means = function([a.requires_grad_() for a in levels], mode)
        up = pyramid([a.shape for a in means], seed=seed, device=x[0].device)
        total = sum((a * b).sum() for a, b in zip(means, up, strict=True))
        results.append(([a.detach() for a in means], torch.autograd.grad(total, levels)))
    return results


@on_all_kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_value_and_gradient(dtype, layout, mode, backend, device):
    x = pyramid(SHAPES, dtype, layout, 1, device)
    x[1][0, 2, 3, 4] = 0
    with poisoned(backend):
        (means, gradients), (means64, gradients64) = _both(backend, x, mode)
    for got, want in zip(means, means64, strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape and relative_error(got, want) < 1e-6
    for got, want, level in zip(gradients, gradients64, x, strict=True):
        assert got.dtype == dtype and got.stride() == level.stride()
        assert relative_error(got, want) < ROUNDING[dtype]


@on_all_kernels
@pytest.mark.parametrize("mode", MODES)
def test_seven_levels_of_several_strides(mode, backend, device):
    """Two launches each way; slices with gaps and both layouts."""
    x = pyramid([(2, 5, 4, k) for k in range(2, 9)], torch.float32, "channels_last", 2, device)
    x[1], x[6], x[3] = x[1].contiguous(), x[6][:, 1:4], x[3][:, :, ::2]
    with poisoned(backend):
        (means, gradients), (means64, gradients64) = _both(backend, x, mode)
    pairs = [*zip(means, means64, strict=True), *zip(gradients, gradients64, strict=True)]
    assert max(relative_error(got, want) for got, want in pairs) < 1e-6
    assert [g.stride() for g in gradients] == [torch.empty_like(level).stride() for level in x]


@on_all_kernels
def test_two_backwards_are_bit_equal_and_only_once_differentiable(backend, device):
    x = [level.requires_grad_() for level in pyramid(SHAPES, device=device)]
    total = sum(level.square().sum() for level in fused(backend, x, "abs"))
    first, second = (torch.autograd.grad(total, x, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gradient = torch.autograd.grad(total, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@on_all_kernels
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite(poison, backend, device):
    """In x it reaches its channel's mean; in the means' gradient the whole channel's, or it would seem to be none."""
    x = pyramid(SHAPES[:2], torch.bfloat16, device=device)
    x[0][1, 7, 3, 4] = poison
    for absolute in (False, True):
        means = torch.ops.kdkernels.channel_mean(backend, x, absolute)
        assert (~means.isfinite()).nonzero().flatten().tolist() == [20 + 7]
    grad = torch.zeros(2 * 23, device=device)
    grad[2] = poison
    gradients = torch.ops.kdkernels.channel_mean_backward(backend, pyramid(SHAPES[:2], device=device), grad, True)
    assert not gradients[0][0, 2].isfinite().any() and gradients[0][1].isfinite().all() and gradients[1].isfinite().all()


@on_all_kernels
def test_empty(backend, device):
    x = [level.requires_grad_() for level in pyramid([(0, 4, 3, 5), (0, 2, 1, 1)], torch.float16, device=device)]
    means = fused(backend, x, "signed")
    gradients = torch.autograd.grad(pack(means).sum(), x)
    assert fused(backend, [], "abs") == [] and [level.shape for level in means] == [(0, 4), (0, 2)]
    assert [(g.shape, g.dtype) for g in gradients] == [(level.shape, level.dtype) for level in x]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_keep_to_their_schema(layout, backend, device):
    x = pyramid(SHAPES[1:], torch.float16, layout, device=device)
    x.append(x[0][:, 1:, 2:])
    checks = ("test_schema", "test_faketensor")
    grad = pyramid([(2 * sum(level.shape[1] for level in x),)], device=device)[0]
    done = torch.library.opcheck(torch.ops.kdkernels.channel_mean.default, (backend, x, True), test_utils=checks)
    done |= torch.library.opcheck(torch.ops.kdkernels.channel_mean_backward.default, (backend, x, grad, True), test_utils=checks)
    assert done == dict.fromkeys(checks, "SUCCESS")


@on_all_kernels
def test_the_library_s_choice_of_a_backend(backend, device, monkeypatch):
    x = pyramid(SHAPES[1:], device=device)
    monkeypatch.setattr(backends, "_choice", backend)
    got = functional.channel_mean(dict(enumerate(x)), "abs")
    assert all(torch.equal(a, b) for a, b in zip(got, fused(backend, x, "abs"), strict=True))
