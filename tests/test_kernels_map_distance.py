"""The kernels of `map_distance` for GPUs against the reference in float64: values and gradients of the student's maps."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from all_kernels import on_gpu_kernels, poisoned
from levels import pyramid, relative_error
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.ops import map_distance as public
from kdkernels.ops.map_distance import fused
from kdkernels.reference.map_distance import map_distance as reference

pytestmark = on_gpu_kernels
NAN, INF = float("nan"), float("inf")
NORMALIZERS, DISTANCES = ("minmax", "zscore", "softmax", "none"), ("l1", "mse", "smooth_l1")
#: A map of 67 pixels has odd addresses behind it, one pixel is constant by itself.
SHAPES = [(2, 5, 7), (2, 1, 1), (2, 1, 67), (2, 4, 4)]
Maps = Sequence[Tensor]


def maps(shapes: Sequence[Sequence[int]], seed: int, device: str, scale: float = 1.0) -> list[Tensor]:
    return [scale * x for x in pyramid(shapes, seed=seed, device=device)]


def value_and_gradient(
    function: Any, m_s: Maps, m_t: Maps, upstream: Tensor, spatial: Maps | None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    student = [x.detach().clone().requires_grad_() for x in m_s]
    rows = function(student, m_t, spatial=spatial, **options)
    return rows.detach(), list(torch.autograd.grad(rows, student, upstream.to(rows)))


def check(
    backend: str, m_s: Maps, m_t: Maps, spatial: Maps | None = None, upstream: Tensor | None = None, tolerance: float = 1e-5, **options: Any
) -> None:
    """Values to `tolerance`, gradients too in the norm of a level, which the sums at an extremum dominate."""
    up = pyramid([(len(m_s), m_s[0].shape[0])], seed=9)[0] if upstream is None else upstream
    with poisoned(backend):
        rows, gradients = value_and_gradient(functools.partial(fused, backend), m_s, m_t, up.to(m_s[0].device), spatial, **options)
    wide = [x.double().cpu() for x in m_s], [x.double().cpu() for x in m_t]
    factors = None if spatial is None else [x.double().cpu() for x in spatial]
    want, want_gradients = value_and_gradient(reference, *wide, up, factors, **options)
    assert rows.dtype == torch.float32 and relative_error(rows, want) < tolerance
    for level, (got, expected) in enumerate(zip(gradients, want_gradients, strict=True)):
        assert relative_error(got, expected) < 10 * tolerance, f"gradient of level {level}: {got} instead of {expected}"


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_every_combination_of_options(backend, device, normalize):
    m_s, m_t, weights = (maps([(2, 5, 7), (2, 1, 67)], seed, device) for seed in (1, 2, 3))
    for distance, eps_mode, average, spatial in itertools.product(DISTANCES, ("relative", "absolute"), ("nhw", "n"), (None, weights)):
        check(
            backend,
            m_s,
            m_t,
            spatial,
            normalize=normalize,
            distance=distance,
            eps=0.03,
            eps_mode=eps_mode,
            average=average,
            temperature=0.7,
        )
    assert weights[0].isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_any_sizes(backend, device, seed):
    """Random, without hypothesis, which GPU machines may lack."""
    chance = random.Random(seed)
    images = chance.randint(1, 3)
    shapes = [(images, chance.randint(1, 14), chance.randint(1, 19)) for _ in range(chance.randint(1, 7))]
    check(backend, maps(shapes, 4, device), maps(shapes, 5, device), normalize=NORMALIZERS[seed % 4], distance=DISTANCES[seed % 3])
    assert 1 <= len(shapes) <= 7


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_maps_of_more_than_a_block_and_seven_levels(backend, device, normalize):
    """Seven levels take two launches; a map of more than 4096 pixels takes more than a turn of the loops, a gradient more than a tile."""
    shapes = [(1, 3, 5), (1, 67, 71), (1, 1, 1), (1, 90, 100), (1, 2, 2), (1, 64, 64), (1, 4, 3)]
    m_s, m_t = maps(shapes, 6, device), maps(shapes, 7, device)
    check(backend, m_s, m_t, normalize=normalize, distance="mse")
    check(backend, m_s, m_t, normalize=normalize, distance="l1")
    assert len(m_s) == 7


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
def test_ties_share_and_constant_maps_have_no_gradient(backend, device, normalize, distance):
    m_s, m_t = maps([(3, 4, 5)], 8, device), maps([(3, 4, 5)], 9, device)
    high, low = m_s[0][0].max(), m_s[0][0].min()
    m_s[0][0, 0, :3], m_s[0][0, 2:, 1] = high, low
    m_s[0][1] = 0.1
    m_t[0][2] = -7.3
    check(backend, m_s, m_t, normalize=normalize, distance=distance)
    _, (gradient,) = value_and_gradient(
        functools.partial(fused, backend), m_s, m_t, torch.ones(1, 3, device=device), None, normalize=normalize, distance=distance
    )
    assert gradient[1].eq(0).all() and gradient[2].ne(0).any()
    if normalize == "minmax":
        assert m_s[0][0].eq(high).sum() > 2 and m_s[0][0].eq(low).sum() > 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
def test_the_scale_does_not_matter(backend, device, normalize, scale):
    for distance in DISTANCES:
        check(backend, maps(SHAPES, 1, device, scale), maps(SHAPES, 2, device, 1 / scale), normalize=normalize, distance=distance)
    m_s, m_t = maps(SHAPES, 1, device), maps(SHAPES, 2, device)
    small = fused(backend, [scale * x for x in m_s], m_t, normalize)
    assert relative_error(small, fused(backend, m_s, m_t, normalize)) < 1e-6


def test_a_large_common_offset_cancels_nothing(backend, device):
    """Mean 4096 and range 1: its fp32 mean is off by a thousandth of the range, the variance of squares by more than itself."""
    m_s, m_t = ([4096 + (x / 8).clamp(-0.5, 0.5) for x in maps(SHAPES, seed, device)] for seed in (1, 2))
    for normalize in NORMALIZERS:
        check(backend, m_s, m_t, normalize=normalize, distance="mse")
    outlier = [torch.ones(1, 30, 30, device=device)]
    outlier[0][0, 3, 4] = 0
    check(backend, outlier, maps([(1, 30, 30)], 3, device), normalize="zscore", distance="mse")
    assert outlier[0].sum() == 899


@pytest.mark.parametrize("offset", [-1000.0, -50.0, 50.0, 1000.0])
def test_the_softmax_of_maps_far_from_zero(backend, device, offset):
    """What lies behind a map's end is read as 0, whose exponential is infinite beside values of -1000."""
    m_s, m_t = ([offset + x for x in maps([(2, 5, 7)], seed, device)] for seed in (1, 2))
    check(backend, m_s, m_t, normalize="softmax", distance="mse", tolerance=2e-5)
    near = fused(backend, [x - offset for x in m_s], [x - offset for x in m_t], "softmax", "mse")
    assert relative_error(fused(backend, m_s, m_t, "softmax", "mse"), near) < 1e-6


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["m_s", "m_t"])
@pytest.mark.parametrize("normalize", ["minmax", "zscore", "softmax"])
def test_what_is_not_finite_shows_in_its_image_only(backend, device, normalize, side, value):
    for distance, place in itertools.product(DISTANCES, [(0, 0), (3, 4)]):
        given = {"m_s": maps([(2, 4, 5)], 1, device), "m_t": maps([(2, 4, 5)], 2, device)}
        given[side][0][1][place] = value
        rows, (gradient,) = value_and_gradient(
            functools.partial(fused, backend), **given, upstream=torch.ones(1, 2, device=device), spatial=None,
            normalize=normalize, distance=distance,
        )  # fmt: skip
        assert rows[0, 0].isfinite() and gradient[0].isfinite().all()
        assert rows[0, 1].isnan() and gradient[1].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_without_normaliser_what_is_not_finite_is_as_in_the_reference(backend, device, value):
    m_s, m_t = maps([(2, 4, 5)], 1, device), maps([(2, 4, 5)], 2, device)
    m_t[0][1, 2, 3] = value
    got = fused(backend, m_s, m_t, "none").cpu()
    assert torch.equal(got.isnan(), torch.tensor([[False, value != value]])) and not got[0, 1].isfinite()


def test_the_cotangent_is_applied_once_whatever_it_is(backend, device):
    shapes = [(2, 6, 7), (2, 3, 4)]
    m_s, m_t = maps(shapes, 1, device), maps(shapes, 2, device)
    for upstream in (torch.full((2, 2), 65536.0), torch.tensor([[0.0, -3.0], [1e-20, 2.0]])):
        check(backend, m_s, m_t, upstream=upstream)
    student = [x.clone().requires_grad_() for x in m_s]
    rows = fused(backend, student, m_t)
    first = torch.autograd.grad(rows.sum(), student, retain_graph=True)
    second = torch.autograd.grad((rows * 3).sum(), student, retain_graph=True)
    again = torch.autograd.grad(rows.sum(), student)
    assert all(relative_error(b, 3 * a) < 1e-6 and torch.equal(a, c) for a, b, c in zip(first, second, again, strict=True))


def test_two_runs_are_equal_to_the_bit(backend, device):
    shapes = [(2, 70, 65), (2, 9, 8)]
    run = functools.partial(fused, backend, distance="smooth_l1", normalize="zscore")
    results = [
        value_and_gradient(run, maps(shapes, 1, device), maps(shapes, 2, device), torch.ones(2, 2, device=device), None) for _ in range(2)
    ]
    (rows, gradients), (rows_again, gradients_again) = results
    assert torch.equal(rows, rows_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_a_teacher_of_other_sizes_is_normalised_before_it_is_resized(backend, device, normalize):
    m_s, m_t = maps([(2, 6, 7), (2, 4, 4)], 1, device), maps([(2, 3, 4), (2, 4, 4)], 2, device)
    check(backend, m_s, m_t, normalize=normalize)
    check(backend, m_s, m_t, maps([(2, 6, 7), (2, 4, 4)], 3, device), normalize=normalize, distance="mse")
    assert m_s[0].shape != m_t[0].shape


def test_views_and_strides(backend, device):
    """Adjacent views of one buffer are read where they lie; slices with gaps and transposed maps are not."""
    buffer = maps([(1, 1 + 2 * (12 + 20))], 1, device)[0][0]
    adjacent = [buffer[1:25].view(2, 3, 4), buffer[25:].view(2, 4, 5)]
    check(backend, adjacent, maps([(2, 3, 4), (2, 4, 5)], 2, device))
    gaps = [maps([(2, 4, 9)], 3, device)[0][:, :, 1:8:2], maps([(2, 5, 4)], 4, device)[0].mT]
    check(backend, gaps, [x.mT.contiguous().mT for x in maps([(2, 4, 4), (2, 4, 5)], 5, device)])
    assert not gaps[0].is_contiguous() and not gaps[1].is_contiguous()


def test_no_images_and_no_levels(backend, device):
    student = [torch.zeros(0, 3, 4, device=device, requires_grad=True), torch.zeros(0, 2, 2, device=device, requires_grad=True)]
    rows = fused(backend, student, [x.detach() for x in student])
    gradients = torch.autograd.grad(rows.sum(), student)
    assert rows.shape == (2, 0) and [g.shape for g in gradients] == [x.shape for x in student]
    assert fused(backend, [], []).shape == (0, 0)


def test_the_public_function_uses_the_kernels_unless_the_teacher_wants_a_gradient(backend, device, monkeypatch):
    monkeypatch.setattr(backends, "_choice", backend)
    m_s, m_t = maps(SHAPES, 1, device), maps(SHAPES, 2, device)
    assert torch.equal(public(m_s, m_t, "zscore", eps=0), fused(backend, m_s, m_t, "zscore", eps=0))
    for constants in (
        {"m_t": [x.clone().requires_grad_() for x in m_t]},
        {"m_t": m_t, "spatial": [x.clone().requires_grad_() for x in m_t]},
    ):
        with pytest.raises(RuntimeError, match="require a gradient"):
            public(m_s, **constants)
        with torch.no_grad():
            assert public(m_s, **constants).isfinite().all()


def test_the_operators_follow_the_rules_of_torch_library(backend, device):
    packed, other = (torch.cat([x.reshape(-1) for x in maps(SHAPES, seed, device)]) for seed in (1, 2))
    sizes = [2, [h * w for _, h, w in SHAPES]]
    options = ["minmax", "minmax", "l1", 1e-6, True, 0.5, "nhw"]
    tests = ("test_schema", "test_faketensor")
    rows, state = torch.ops.kdkernels.map_distance(backend, packed, other, None, *sizes, *options)
    forward = torch.library.opcheck(torch.ops.kdkernels.map_distance, (backend, packed, other, packed, *sizes, *options), test_utils=tests)
    backward = torch.library.opcheck(
        torch.ops.kdkernels.map_distance_backward, (backend, packed, other, None, state, rows, *sizes, *options), test_utils=tests
    )
    assert set(forward.values()) == set(backward.values()) == {"SUCCESS"}
