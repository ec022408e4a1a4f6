"""`shared_read`: what it returns, on every backend, is what its two primitives return."""

from __future__ import annotations

import functools
import importlib
import itertools
from unittest import mock

import pytest
import torch
from all_kernels import on_gpu_kernels, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from triton_support import DEVICES

from kdkernels import backend as backends
from kdkernels import functional
from kdkernels.ops import shared_read
from kdkernels.ops.shared_read import fused
from kdkernels.reference.shared_read import shared_read as reference

SHAPES = [(2, 20, 7, 9), (2, 3, 4, 6), (2, 1, 1, 1)]
OPTIONS = list(itertools.product(("raw", "abs"), ("abs", "relu", "none")))


def weights(shapes=SHAPES, **how):
    return pyramid([shape[:2] for shape in shapes], seed=5, **how)


def flat(result):
    return [level for part in result for level in part]


def check(backend, x, w, activation="raw", rectify="abs", temperature=0.5):
    """The kernels' results against the reference in float64."""
    want = reference([a.double().cpu() for a in x], [v.double().cpu() for v in w], activation, rectify, temperature)
    with poisoned(backend):
        got = flat(fused(backend, x, w, activation, rectify, temperature))
    for a, b in zip(got, flat(want), strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert relative_error(a, b) < 2e-6
    return got


@pytest.mark.parametrize("activation, rectify", OPTIONS)
def test_the_reference_composes_the_two_primitives(activation, rectify):
    x, w = pyramid(SHAPES, torch.float64), weights(dtype=torch.float64)
    maps, spatial, channel = shared_read(x, w, activation, rectify, 0.7)
    want_maps, _, _ = functional.weighted_channel_sum(x, w, activation, rectify)
    assert all(torch.equal(a, b) for a, b in zip(maps, want_maps, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(spatial + channel, flat(functional.attention(x, 0.7)), strict=True))


def test_the_reference_takes_weights_per_element_and_gives_gradients():
    x = [a.requires_grad_() for a in pyramid(SHAPES[:2], torch.float64)]
    w = pyramid(SHAPES[:2], torch.float64, seed=6)
    maps, spatial, _ = shared_read(dict(enumerate(x)), w)
    assert torch.equal(maps[0], functional.weighted_channel_sum(x, w)[0][0])
    assert all(g.ne(0).any() for g in torch.autograd.grad([maps[1].sum(), spatial[0].square().sum()], x))


def test_empty_and_no_images():
    assert shared_read([], []) == ([], [], [])
    maps, spatial, channel = shared_read([torch.zeros(0, 3, 2, 2)], [torch.zeros(0, 3)])
    assert (maps[0].shape, spatial[0].shape, channel[0].shape) == ((0, 2, 2), (0, 2, 2), (0, 3))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"activation": "square"}, "activation"),
        ({"rectify": "sigmoid"}, "rectify"),
        ({"w": [torch.zeros(2, 20)]}, "w has 1 levels, x has 3"),
        ({"w": [torch.zeros(2, 20), torch.zeros(2, 4), torch.zeros(2, 1)]}, r"w, level 1: got shape \(2, 4\), wanted \(2, 3\)"),
        ({"x": torch.zeros(2, 3, 4, 4)}, "x must be a list"),
    ],
)
def test_wrong_arguments_are_refused(changes, words):
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        shared_read(**{"x": pyramid(SHAPES), "w": weights(), **changes})
    assert raised.type is (TypeError if "must be a list" in words else ValueError)


@on_gpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(backend, device, dtype, layout):
    x = pyramid(SHAPES, DTYPES[dtype], layout, device=device)
    results = [check(backend, x, weights(device=device), *options) for options in OPTIONS]
    assert all(torch.equal(result[len(x)], results[0][len(x)]) for result in results)


@on_gpu_kernels
@settings(max_examples=6)
@given(
    images=st.integers(1, 2),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (20, 14, 19)]), min_size=1, max_size=3),
    temperature=st.sampled_from([0.1, 0.5, 2.0]),
)
def test_any_shapes(backend, device, images, sizes, temperature):
    shapes = [(images, *size) for size in sizes]
    results = check(backend, pyramid(shapes, device=device), weights(shapes, device=device), temperature=temperature)
    assert len(results) == 3 * len(shapes)


@on_gpu_kernels
def test_weights_in_16_bit_and_no_images(backend, device):
    x = pyramid(SHAPES, device=device)
    w = weights(dtype=torch.bfloat16, device=device)
    results = check(backend, x, w)
    none = flat(fused(backend, [a[:0] for a in x], [v[:0] for v in w], "raw", "abs", 0.5))
    assert [a.shape for a in none] == [a[:0].shape for a in results]
    assert fused(backend, [], [], "raw", "abs", 0.5) == ([], [], [])


@pytest.mark.parametrize("device", DEVICES)
def test_triton_reads_once(device):
    module = importlib.import_module("kdkernels.triton.shared_read")
    with mock.patch.object(module, "reduce", wraps=module.reduce) as reads:
        check("triton", pyramid(SHAPES, device=device), weights(device=device))
    assert reads.call_count == 1


@on_gpu_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_do_not_become_innocent_numbers(backend, device, bad):
    (x,) = pyramid([(3, 4, 5, 6)], device=device)
    x[1, 2, 4, 3] = bad
    for rectify in ("abs", "relu", "none"):
        maps, spatial, channel = fused(backend, [x], [torch.ones(3, 4, device=device)], "raw", rectify, 0.5)
        assert not maps[0][1, 4, 3].isfinite() and int((~maps[0].isfinite()).sum()) == 1
        for a in (spatial[0], channel[0]):
            assert a[::2].isfinite().all() and not a[1].isfinite().any()


@on_gpu_kernels
def test_the_backend_serves_only_what_needs_no_gradient(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_choice", backend)
    x, w = pyramid(SHAPES, torch.float16, device=device), weights(device=device)
    got = flat(shared_read(x, w))
    assert all(torch.equal(a, b) for a, b in zip(got, flat(fused(backend, x, w, "raw", "abs", 0.5)), strict=True))
    w[0].requires_grad_()
    with pytest.raises(RuntimeError, match="require a gradient"):
        shared_read(x, w)
    with torch.no_grad():
        assert not shared_read(x, w)[0][0].requires_grad
    with pytest.raises(RuntimeError, match="weight per element"):
        shared_read(x, x)


@on_gpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_and_fake(backend, device, layout):
    x = pyramid(SHAPES[1:], torch.float16, layout, device=device)
    check_operator = functools.partial(torch.library.opcheck, torch.ops.kdkernels.shared_read.default)
    tests = ("test_schema", "test_faketensor")
    result = check_operator(
        (backend, x, torch.cat([v.flatten() for v in weights(SHAPES[1:], device=device)]), False, 0.5), test_utils=tests
    )
    assert result == dict.fromkeys(tests, "SUCCESS")
