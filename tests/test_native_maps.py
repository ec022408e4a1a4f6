"""The native kernels of `map_distance`, for the CPU and for CUDA, against the reference in float64: values and the student's gradients."""

from __future__ import annotations

import itertools
import random
import re
from functools import partial
from typing import Any

import native_support
import pytest
import torch
from cuda_support import MACHINES
from levels import relative_error
from maps_support import DISTANCES, NORMALIZERS, SHAPES, Maps, check, doubles, kernels, maps, value_and_gradients
from native_support import GRADIENT, needs_library
from torch import Tensor

from kdkernels import backend, library
from kdkernels.functional import map_distance as public
from kdkernels.ops.terms import MapTerm
from kdkernels.ops.terms import fused as fused_terms
from kdkernels.reference.terms import terms as reference_terms

pytestmark = needs_library
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=MACHINES)
def machine(request):
    with request.param():
        yield


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_every_combination_of_options(normalize):
    m_s, m_t, weights = (maps([(2, 5, 7), (2, 1, 67)], seed) for seed in (1, 2, 3))
    results = [
        check(m_s, m_t, spatial, normalize=normalize, distance=distance, eps=0.03, eps_mode=eps_mode, average=average, temperature=0.7)
        for distance, eps_mode, average, spatial in itertools.product(DISTANCES, ("relative", "absolute"), ("nhw", "n"), (None, weights))
    ]
    assert len({float(rows[0, 0]) for rows, *_ in results}) >= 12


@pytest.mark.parametrize("seed", range(12))
def test_any_sizes(seed):
    chance = random.Random(seed)
    images = chance.randint(1, 3)
    shapes = [(images, chance.randint(1, 14), chance.randint(1, 19)) for _ in range(chance.randint(1, 7))]
    results = check(maps(shapes, 4), maps(shapes, 5), normalize=NORMALIZERS[seed % 4], distance=DISTANCES[seed % 3])
    assert len(results) == 1 + len(shapes)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_maps_of_several_blocks(normalize):
    """More than 4096 elements, after which the sums in fp32 meet those in double: exactly one block, a rest, two blocks and a rest."""
    shapes = [(1, 64, 64), (1, 67, 71), (1, 3, 5), (1, 90, 100)]
    results = [check(maps(shapes, 6), maps(shapes, 7), normalize=normalize, distance=distance) for distance in ("mse", "l1")]
    assert all(rows.gt(0).all() for rows, *_ in results)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
def test_ties_share_and_constant_maps_have_no_gradient(normalize, distance):
    m_s, m_t = maps([(3, 4, 5)], 8), maps([(3, 4, 5)], 9)
    high, low = m_s[0][0].max(), m_s[0][0].min()
    m_s[0][0, 0, :3], m_s[0][0, 2:, 1] = high, low
    m_s[0][1] = 0.1
    m_t[0][2] = -7.3
    _, gradient = check(m_s, m_t, normalize=normalize, distance=distance)
    assert gradient[1].eq(0).all() and gradient[2].ne(0).any()
    assert m_s[0][0].eq(high).sum() > 2 and m_s[0][0].eq(low).sum() > 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
def test_the_scale_does_not_matter(normalize, scale):
    for distance in DISTANCES:
        check(maps(SHAPES, 1, scale), maps(SHAPES, 2, 1 / scale), normalize=normalize, distance=distance)
    m_s, m_t = maps(SHAPES, 1), maps(SHAPES, 2)
    small = kernels([scale * x for x in m_s], m_t, normalize)
    assert relative_error(small, kernels(m_s, m_t, normalize)) < 1e-6


def test_a_large_common_offset_cancels_nothing():
    """Mean 4096 and range 1: its fp32 mean is off by a thousandth of the range, the variance of squares by more than itself."""
    m_s, m_t = ([4096 + (x / 8).clamp(-0.5, 0.5) for x in maps(SHAPES, seed)] for seed in (1, 2))
    for normalize in NORMALIZERS:
        check(m_s, m_t, normalize=normalize, distance="mse")
    outlier = [torch.ones(1, 30, 30)]
    outlier[0][0, 3, 4] = 0
    check(outlier, maps([(1, 30, 30)], 3), normalize="zscore", distance="mse")
    assert outlier[0].sum() == 899


@pytest.mark.parametrize("offset", [-1000.0, -50.0, 50.0, 1000.0])
def test_the_softmax_of_maps_far_from_zero(offset):
    """What lies behind the last pixel counts as 0, the exponential of which is infinite where the largest value is -1000."""
    shapes = [(2, 5, 7), (2, 4, 4)]
    m_s, m_t = ([offset + x for x in maps(shapes, seed)] for seed in (1, 2))
    rows, *gradients = check(m_s, m_t, normalize="softmax", distance="mse")
    assert all(x.isfinite().all() for x in (rows, *gradients))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["m_s", "m_t"])
@pytest.mark.parametrize("normalize", ["minmax", "zscore", "softmax"])
def test_what_is_not_finite_shows_in_its_image_only(normalize, side, value):
    for distance, place in itertools.product(DISTANCES, [(0, 0), (3, 4)]):
        given = {"m_s": maps([(2, 4, 5)], 1), "m_t": maps([(2, 4, 5)], 2)}
        given[side][0][1][place] = value
        run = partial(value_and_gradients, kernels, **given, upstream=torch.ones(1, 2), normalize=normalize, distance=distance)
        rows, gradient = native_support.same_everywhere(run)
        assert rows[0, 0].isfinite() and gradient[0].isfinite().all()
        assert rows[0, 1].isnan() and gradient[1].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_without_normaliser_what_is_not_finite_is_as_in_the_reference(value):
    m_s, m_t = maps([(2, 4, 5)], 1), maps([(2, 4, 5)], 2)
    m_t[0][1, 2, 3] = value
    (got,) = native_support.same_everywhere(lambda: [kernels(m_s, m_t, "none")])
    assert torch.equal(got.isnan(), torch.tensor([[False, value != value]])) and not got[0, 1].isfinite()


def test_the_cotangent_is_applied_once_whatever_it_is():
    shapes = [(2, 6, 7), (2, 3, 4)]
    m_s, m_t = maps(shapes, 1), maps(shapes, 2)
    for upstream in (torch.full((2, 2), 65536.0), torch.tensor([[0.0, -3.0], [1e-20, 2.0]])):
        _, *gradients = check(m_s, m_t, upstream=upstream)
        assert gradients[0][0].eq(0).all() == (upstream[0, 0] == 0)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_a_teacher_of_other_sizes_is_normalised_before_it_is_resized(normalize):
    m_s, m_t = maps([(2, 6, 7), (2, 4, 4)], 1), maps([(2, 3, 4), (2, 4, 4)], 2)
    check(m_s, m_t, normalize=normalize)
    check(m_s, m_t, maps([(2, 6, 7), (2, 4, 4)], 3), normalize=normalize, distance="mse")
    assert m_s[0].shape != m_t[0].shape


def test_views_and_strides():
    """Adjacent views of one buffer are read where they lie, unaligned; slices with gaps and transposed maps are not."""
    buffer = maps([(1, 1 + 2 * (12 + 20))], 1)[0][0]
    check([buffer[1:25].view(2, 3, 4), buffer[25:].view(2, 4, 5)], maps([(2, 3, 4), (2, 4, 5)], 2))
    gaps = [maps([(2, 4, 9)], 3)[0][:, :, 1:8:2], maps([(2, 5, 4)], 4)[0].mT]
    check(gaps, [x.mT.contiguous().mT for x in maps([(2, 4, 4), (2, 4, 5)], 5)])
    assert not gaps[0].is_contiguous() and not gaps[1].is_contiguous()


def test_no_images_and_no_levels():
    student = [torch.zeros(0, 3, 4, requires_grad=True), torch.zeros(0, 2, 2, requires_grad=True)]
    rows = kernels(student, [x.detach() for x in student])
    gradients = torch.autograd.grad(rows.sum(), student)
    assert rows.shape == (2, 0) and [g.shape for g in gradients] == [x.shape for x in student]
    assert kernels([], []).shape == (0, 0)


def of_term(function: Any, m_s: Maps, term: MapTerm) -> list[Tensor]:
    """The distances that `terms` makes of features of one channel, times -3, and their gradients."""
    features = [x.unsqueeze(1).requires_grad_() for x in m_s]
    (rows,) = function(features, [(term, -3.0)])
    return [rows.detach(), *torch.autograd.grad(rows.sum(), features)]


@pytest.mark.parametrize("rectify", ["none", "abs", "relu"])
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_the_student_may_be_rectified_when_it_is_read(normalize, rectify):
    """As `terms` does it, here of one channel. A rectified map has many equal minima where relu stops, none with a gradient of its own."""
    m_s, m_t, weights = (maps(SHAPES, seed) for seed in (1, 2, 3))
    ones = [torch.ones(2, 1) for _ in SHAPES]
    for distance, spatial in itertools.product(DISTANCES, (None, weights)):
        options = ("raw", rectify, normalize, distance, 0.02, "relative", 0.5, "nhw")
        found = native_support.same_everywhere(partial(of_term, partial(fused_terms, "native"), m_s, MapTerm(ones, m_t, spatial, *options)))
        exact = MapTerm(doubles(ones), doubles(m_t), spatial and doubles(spatial), *options)
        for got, want in zip(found, of_term(reference_terms, doubles(m_s), exact), strict=True):
            assert relative_error(got, want) < GRADIENT[torch.float32]


@pytest.mark.parametrize("bad", [-INF, NAN])
def test_a_rectified_map_keeps_what_is_not_finite(bad):
    """The relu of -inf would be an innocent 0."""
    m_s, m_t = maps([(2, 4, 5)], 1), maps([(2, 4, 5)], 2)
    m_s[0][1, 2, 3] = bad
    for normalize in NORMALIZERS:
        term = MapTerm([torch.ones(2, 1)], m_t, None, "raw", "relu", normalize, "l1", 1e-6, "relative", 0.5, "nhw")
        rows, gradient = of_term(partial(fused_terms, "native"), m_s, term)
        assert rows[0, 0].isfinite() and rows[0, 1].isnan()
        assert gradient[0].isfinite().all() and gradient[1].isnan().all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalize": "cosine"}, "unknown normalize 'cosine'"),
        ({"normalize_t": "cosine"}, "unknown normalize 'cosine'"),
        ({"distance": "cosine"}, "unknown distance 'cosine'"),
        ({"average": "c"}, "unknown average 'c'"),
        ({"pixels": [2, 0]}, "a map without pixels"),
        ({"pixels": [3]}, "expected 3 contiguous"),
        ({"spatial": torch.zeros(1)}, "expected 2 contiguous"),
    ],
)
def test_the_operator_refuses_what_it_does_not_know(changes, words):
    options = {"normalize": "minmax", "normalize_t": "none", "distance": "l1", "eps": 1e-6, "relative": True, "temperature": 0.5}
    given = {"m_s": torch.zeros(2), "m_t": torch.zeros(2), "spatial": None, "images": 1, "pixels": [2], **options, "average": "n"}
    with pytest.raises(RuntimeError, match=words) as raised:
        library._kernel("native", "map_distance", "map_distance")(**{**given, **changes})
    assert re.search(r"\.(cpp|cu|h):\d+, ", str(raised.value)), "it names no line of the sources"


def test_the_public_function_uses_the_kernels(monkeypatch):
    monkeypatch.setattr(backend, "_choice", "native")
    m_s, m_t = maps(SHAPES, 1), maps(SHAPES, 2)
    assert torch.equal(public(m_s, m_t, "zscore", eps=0), kernels(m_s, m_t, "zscore", eps=0))
    with pytest.raises(RuntimeError, match="require a gradient"):
        public(m_s, [x.clone().requires_grad_() for x in m_t])


def test_the_operators_follow_the_rules_of_torch_library():
    packed, other = (torch.cat([x.reshape(-1) for x in maps(SHAPES, seed)]) for seed in (1, 2))
    options = [2, [h * w for _, h, w in SHAPES], "minmax", "minmax", "l1", 1e-6, True, 0.5, "nhw"]
    tests = ("test_schema", "test_faketensor")
    rows, state = torch.ops.kdkernels.map_distance("native", packed, other, None, *options)
    given = {"map_distance": (packed, other, packed), "map_distance_backward": (packed, other, None, state, rows)}
    for name, tensors in given.items():
        operator = getattr(torch.ops.kdkernels, name).default
        assert torch.library.opcheck(operator, ("native", *tensors, *options), test_utils=tests) == dict.fromkeys(tests, "SUCCESS")
