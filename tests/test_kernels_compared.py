"""`channel_kl` and `correlation` by fused kernels against the reference in float64, and what their operators tell torch of themselves."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from all_kernels import on_all_kernels, poisoned
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from native_support import GRADIENT, VALUE
from torch import Tensor

from kdkernels import backend as backends
from kdkernels import functional


class Primitive(NamedTuple):
    """fused: takes a backend's name before the primitive's arguments;   options: of the primitive"""

    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    options: tuple[Any, ...]


def _primitive(name: str, *options: Any) -> Primitive:
    # `kdkernels.ops.channel_kl` is the function of that name.
    module = importlib.import_module(f"kdkernels.ops.{name}")
    return Primitive(module.fused, module.reference, options)


PRIMITIVES = {
    "channel_kl": _primitive("channel_kl", 0.7, True),
    "cross_entropy": _primitive("channel_kl", 2.0, False),
    "correlation": _primitive("correlation", 1e-6),
}
of_every_primitive = pytest.mark.parametrize("name", PRIMITIVES)
#: More pixels than a band, more channels than a block, rows that are no whole vectors, and few of everything.
SHAPES = [(2, 9, 47, 45), (2, 70, 6, 8), (2, 3, 7, 11), (2, 1, 1, 2)]


def features(shapes=SHAPES, dtype=torch.float32, layout="contiguous", device="cpu", scale=1.0, offset=0.0):
    """Student's and teacher's levels, of which one lies in the other layout and one has gaps."""
    s, t = (pyramid(shapes, torch.float32, layout, seed, device) for seed in (1, 2))
    s, t = ([(scale * x + shift).to(dtype) for x in levels] for levels, shift in ((s, offset), (t, -0.5 * offset)))
    return s, [x.contiguous(memory_format=LAYOUTS["contiguous"]) if level == 1 else x for level, x in enumerate(t)]


def both(name: str, backend: str, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """(rows, gradients) by the kernels, and of the reference in float64."""
    fused, reference, options = PRIMITIVES[name]
    # Large, so that fp16 has a gradient that is divided by all values of a level.
    up = 1e3 * (torch.rand(len(s), s[0].shape[0], generator=torch.Generator().manual_seed(3)) + 0.5)
    results = []
    for function, own, other in (
        (lambda *args: fused(backend, *args), [x.detach() for x in s], t),
        (reference, [x.detach().double() for x in s], [x.double() for x in t]),
    ):
        leaves = [x.requires_grad_() for x in own]
        rows = function(leaves, other, *options)
        gradients = torch.autograd.grad((rows * up.to(rows)).sum(), leaves)
        results.append((rows.detach(), list(gradients)))
    return results


def check(name: str, backend: str, s: list[Tensor], t: list[Tensor], dtype: torch.dtype) -> None:
    with poisoned(backend):
        (rows, gradients), (rows64, gradients64) = both(name, backend, s, t)
    assert rows.dtype == torch.float32 and rows.shape == rows64.shape
    assert ((rows.double() - rows64).abs() <= VALUE * rows64.abs()).all(), (rows, rows64)
    assert [(g.dtype, g.stride()) for g in gradients] == [(dtype, torch.empty_like(x).stride()) for x in s]
    assert max(relative_error(g, want) for g, want in zip(gradients, gradients64, strict=True)) < GRADIENT[dtype]


@on_all_kernels
@of_every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_value_and_gradient(dtype, layout, name, backend, device):
    s, t = features(SHAPES[:3], dtype, layout, device)
    check(name, backend, s, t, dtype)
    assert all(x.isfinite().all() for x in s)


@on_all_kernels
@of_every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_far_from_0(layout, name, backend, device):
    """Means thousands of times the deviation, logits of 1e4, and a teacher of another scale."""
    s, t = features(SHAPES[:3], torch.float32, layout, device, offset=1e4)
    check(name, backend, s, t, torch.float32)
    s, t = features(SHAPES[:2], torch.float32, layout, device)
    check(name, backend, [0.02 * x for x in s], [5 * x for x in t], torch.float32)
    assert float(s[0].mean().abs()) < 1


@on_all_kernels
@of_every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_types_that_differ_and_seven_levels_of_several_strides(layout, name, backend, device):
    shapes = [(2, 5, 4, k) for k in range(2, 9)]
    s, t = features(shapes, torch.float32, layout, device)
    s[1], s[6], s[3] = s[1].contiguous(), s[6][:, 1:4], s[3][:, :, ::2]
    t[6], t[3] = t[6][:, 1:4], t[3][:, :, ::2]
    check(name, backend, s, [x.half() if level % 2 else x.bfloat16() for level, x in enumerate(t)], torch.float32)
    halves = [x.half() for x in s]
    check(name, backend, halves, t, torch.float16)
    assert len(halves) == 7


@on_all_kernels
@of_every_primitive
def test_features_that_are_equal(name, backend, device):
    s, _ = features(device=device)
    options = PRIMITIVES[name].options
    rows = PRIMITIVES[name].fused(backend, [x.clone().requires_grad_() for x in s], s, *options)
    if name == "cross_entropy":
        assert (rows >= 0).all() and (rows[:3] > 0).all()
    else:
        assert (rows >= 0).all() and rows.max() < 1e-11


@on_all_kernels
@of_every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_features_that_differ_little(name, scale, layout, backend, device):
    """Values keep their digits however small they are, and so do shares of them; of the correlation at another scale too."""
    _, t = features([(2, 3, 20, 21), (2, 9, 7, 11)], layout=layout, device=device)
    for noise in (1e-2, 1e-3):
        more = [noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(device) for x in t]
        s = [(scale * (x + m)).contiguous(memory_format=LAYOUTS[layout]) for x, m in zip(t, more, strict=True)]
        (rows, gradients), (rows64, gradients64) = both(name, backend, s, t)
        # What is a difference of two of the order of 1 has the rounding of these.
        assert ((rows.double() - rows64).abs() <= max(VALUE, 2**-24 / noise) * rows64.abs()).all(), (rows, rows64)
        assert max(relative_error(g, want) for g, want in zip(gradients, gradients64, strict=True)) < 1e-6 / noise


@on_all_kernels
@of_every_primitive
def test_a_single_pixel_and_constant_channels(name, backend, device):
    x = pyramid([(1, 3, 1, 1)], device=device)
    s = [x[0].clone().requires_grad_()]
    rows = PRIMITIVES[name].fused(backend, s, [2 * x[0]], *PRIMITIVES[name].options)
    assert rows.tolist() == [[0.0]]
    assert torch.autograd.grad(rows.sum(), s)[0].abs().sum() == 0
    flat = [torch.full((2, 3, 4, 5), 3.0, device=device)]
    (rows, gradients), (rows64, gradients64) = both(name, backend, flat, pyramid([(2, 3, 4, 5)], device=device))
    assert relative_error(rows, rows64) < VALUE and relative_error(gradients[0], gradients64[0]) < VALUE


@on_all_kernels
@of_every_primitive
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite(poison, name, backend, device):
    """It reaches its row; of the correlation, whose statistics are the batch's, all rows of its level."""
    for of_teacher in (False, True):
        s, t = features(SHAPES[1:3], torch.bfloat16, device=device)
        (t if of_teacher else s)[0][1, 1, 3, 4] = poison
        rows = PRIMITIVES[name].fused(backend, s, t, *PRIMITIVES[name].options)
        assert rows.isfinite().tolist() == [[name != "correlation", False], [True, True]]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (slice(0, 24),)], ids=["first", "within", "half the map"])
def test_values_of_minus_infinity(place, layout, backend, device):
    """They make the divergence of their image nothing finite wherever they lie; of the cross-entropy those of the teacher weigh nothing."""
    for name in ("channel_kl", "cross_entropy"):
        for of_teacher in (True, False):
            s, t = features(SHAPES[:1], layout=layout, device=device)
            (t if of_teacher else s)[0][(1, 1, *place)] = -float("inf")
            (rows, gradients), (rows64, gradients64) = both(name, backend, s, t)
            counted = of_teacher and name == "cross_entropy"
            assert rows.isfinite().tolist() == rows64.isfinite().tolist() == [[True, counted]]
            if counted:
                assert relative_error(rows, rows64) < VALUE and relative_error(gradients[0], gradients64[0]) < VALUE


@on_all_kernels
@of_every_primitive
def test_two_backwards_are_bit_equal_and_only_once_differentiable(name, backend, device):
    s, t = features(SHAPES[1:], device=device)
    s = [x.requires_grad_() for x in s]
    rows = PRIMITIVES[name].fused(backend, s, t, *PRIMITIVES[name].options)
    first, second = (torch.autograd.grad(rows.square().sum(), s, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gradient = torch.autograd.grad(rows.square().sum(), s, create_graph=True)[1]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@on_all_kernels
@of_every_primitive
def test_empty(name, backend, device):
    fused, _, options = PRIMITIVES[name]
    s = [x.requires_grad_() for x in pyramid([(0, 4, 3, 5), (0, 2, 1, 1)], torch.float16, device=device)]
    rows = fused(backend, s, [x.detach() for x in s], *options)
    gradients = torch.autograd.grad(rows.sum(), s)
    assert fused(backend, [], [], *options).shape == (0, 0) and rows.shape == (2, 0)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in s]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_keep_to_their_schema(layout, backend, device):
    s, t = features(SHAPES[1:], torch.float16, layout, device)
    s.append(s[1][:, 1:, 2:])
    t.append(t[1][:, 1:, 2:])
    checks, operators = ("test_schema", "test_faketensor"), torch.ops.kdkernels
    rows, planes = operators.channel_kl(backend, s, t, 1.0, True)
    _, known = operators.correlation(backend, s, t, 1e-6)
    for operator, arguments in (
        (operators.channel_kl, (1.0, True)),
        (operators.channel_kl_backward, (planes, rows, 1.0)),
        (operators.correlation, (1e-6,)),
        (operators.correlation_backward, (known, rows, rows)),
    ):
        done = torch.library.opcheck(operator.default, (backend, s, t, *arguments), test_utils=checks)
        assert done == dict.fromkeys(checks, "SUCCESS")


@on_all_kernels
def test_the_library_s_choice_of_a_backend(backend, device, monkeypatch):
    s, t = features(SHAPES[1:], device=device)
    monkeypatch.setattr(backends, "_choice", backend)
    for name, options in (("channel_kl", (0.7, True)), ("correlation", (1e-6,))):
        got = getattr(functional, name)(dict(enumerate(s)), dict(enumerate(t)), *options)
        assert torch.equal(got, PRIMITIVES[name].fused(backend, s, t, *options))
