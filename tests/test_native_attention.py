"""The native kernels of `attention`, `weighted_channel_sum` and `shared_read`, for the CPU and for CUDA, against the reference in float64.

All three are maps and vectors that one read of the features leaves; the gradients of the first two are one write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import native_support
import pytest
import torch
from attention_support import ACTIVATIONS, PRIMITIVES, SHAPES, Levels, check, flat, of_every_primitive, results_and_gradients, weights_of
from cuda_support import MACHINES
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from native_support import GRADIENT, VALUE, needs_library
from torch import Tensor

from kdkernels import functional
from kdkernels.backend import set_backend
from kdkernels.ops.attention import fused as fused_attention
from kdkernels.ops.shared_read import fused as fused_read
from kdkernels.ops.terms import AttentionTerm
from kdkernels.ops.terms import fused as fused_terms
from kdkernels.ops.weighted_channel_sum import fused as fused_sum
from kdkernels.reference.attention import attention as reference_attention
from kdkernels.reference.terms import terms as reference_terms

pytestmark = needs_library
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=MACHINES)
def machine(request):
    with request.param():
        yield


@of_every_primitive
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_layouts(name, dtype, layout):
    results = check(name, pyramid(SHAPES, DTYPES[dtype], layout))
    assert len(results) >= 3 * len(SHAPES)


@pytest.mark.parametrize("activation, rectify", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_and_rectifiers(layout, activation, rectify):
    x = pyramid(SHAPES[:4], layout=layout, seed=1)
    maps = check("weighted_channel_sum", x, activation, rectify)[: len(x)]
    read = check("shared_read", x, activation, rectify, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(maps, read[: len(x)], strict=True))
    assert rectify == "none" or all(a.ge(0).all() for a in maps)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_temperatures(temperature):
    x = pyramid(SHAPES, seed=2)
    spatial_and_channel = check("attention", x, temperature)[: 2 * len(x)]
    read = check("shared_read", x, "raw", "abs", temperature)
    assert all(torch.equal(a, b) for a, b in zip(spatial_and_channel, read[len(x) :], strict=True))


@of_every_primitive
@settings(max_examples=12)
@given(
    images=st.integers(1, 3),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (40, 14, 19)]), min_size=1, max_size=3),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=3, max_size=3),
)
def test_any_shapes_in_any_layouts(name, images, sizes, layouts):
    # Numbers of one sign: a sum that cancels to nearly 0 by itself is no more exact than its largest term.
    x = [pyramid([(images, *size)], layout=layout)[0].abs() + 0.1 for size, layout in zip(sizes, layouts, strict=False)]
    results = check(name, x, weights=[w.abs() for w in weights_of(x)])
    assert len(results) >= 3 * len(sizes)


@of_every_primitive
def test_slices_and_unaligned_starts(name):
    x = [
        pyramid([(3, 4, 6, 10)])[0][1:2, :, ::2, 3:8],
        torch.randn(1 + 4 * 2 * 5)[1:].view(1, 4, 2, 5),
        pyramid([(1, 9, 5, 6)], layout="channels_last")[0][:, ::2],
        pyramid([(1, 4, 5, 6)])[0].transpose(2, 3),
    ]
    check(name, x)
    assert not x[0].is_contiguous() and x[1].storage_offset() == 1


@of_every_primitive
def test_levels_of_different_types_and_16_bit_weights(name):
    x = [a.to(dtype) for a, dtype in zip(pyramid(SHAPES[:3]), DTYPES.values(), strict=True)]
    results = check(name, x, weights=[w.bfloat16() for w in weights_of(x)])
    assert results[0].dtype == torch.float32


@of_every_primitive
def test_no_images_and_no_levels(name):
    kernels, reference, options, differentiable = PRIMITIVES[name]
    x = pyramid([(1, 3, 2, 2), (1, 2, 1, 1)])
    w = weights_of(x)
    none = [a[:0] for a in x]
    found = results_and_gradients(kernels, none, [v[:0] for v in w], options, differentiable)
    if name == "weighted_channel_sum":
        want = [(0, 2, 2), (0, 1, 1), (2, 0), (2, 0)]
    else:
        want = [(0, *a.shape[1:]) for a in flat(reference(x, w, *options))]
    assert [tuple(a.shape) for a in found] == [*want, *(tuple(a.shape) for a in none if differentiable)]
    assert flat(kernels([], [], *options)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name, options", [("attention", (0.5,)), *(("weighted_channel_sum", how) for how in ACTIVATIONS), ("shared_read", ("raw", "relu", 0.5))]
)
def test_what_is_not_finite_shows_in_its_image_only(name, options, bad, layout):
    """A sum is not finite at the pixel of such a number, the attention of its image and the gradient of that nowhere."""
    kernels, _, _, differentiable = PRIMITIVES[name]
    (x,) = pyramid([(3, 4, 5, 6)], layout=layout)
    x[1, 2, 4, 3] = bad
    found = native_support.same_everywhere(lambda: results_and_gradients(kernels, [x], [torch.ones(3, 4)], options, differentiable))
    if name != "attention":
        raw = found.pop(0)
        assert not raw[1, 4, 3].isfinite() and int((~raw.isfinite()).sum()) == 1
    if name != "weighted_channel_sum":
        assert all(a[::2].isfinite().all() and not a[1].isfinite().any() for a in found)


def test_weights_that_are_not_finite_show_in_their_image_only():
    x, w = pyramid([(2, 4, 5, 6)]), [torch.ones(2, 4)]
    w[0][0, 1] = NAN
    kernels = PRIMITIVES["weighted_channel_sum"].kernels
    maps, extrema, gradient = native_support.same_everywhere(lambda: results_and_gradients(kernels, x, w, ("abs", "abs"), True))
    for a in (maps, extrema.T):
        assert not a[0].isfinite().any() and a[1].isfinite().all()
    assert gradient[1].isfinite().all() and gradient[0, 1].isnan().all()


def test_constant_features_give_one_everywhere():
    spatial, channel = fused_attention("native", [torch.full((1, 3, 7, 7), -4.0)], 0.5)
    assert spatial[0].unique().tolist() == channel[0].unique().tolist() == [1.0]


def test_large_features_saturate_without_overflow():
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1, 1, 0] = 60000.0
    for s, c in zip(*fused_attention("native", [x.half(), x, 1e30 * x, x.bfloat16()], 0.5), strict=True):
        assert s.tolist() == [[[0.0, 0.0], [4.0, 0.0]]]
        assert c.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_very_large_features(scale):
    x = [scale * a for a in pyramid(SHAPES)]
    maps = check("weighted_channel_sum", x)
    spatial = check("attention", x) if scale < 1 else check("attention", x, scale)
    assert all(a.isfinite().all() for a in (*maps, *spatial))


def test_one_result_alone_gets_a_gradient():
    (x,) = (a.requires_grad_() for a in pyramid([(2, 3, 4, 5)]))
    wide = x.detach().double().requires_grad_()
    for which in (0, 1):
        (got,) = torch.autograd.grad(fused_attention("native", [x], 0.5)[which][0].square().sum(), x)
        (want,) = torch.autograd.grad(reference_attention([wide], 0.5)[which][0].square().sum(), wide)
        assert relative_error(got, want) < GRADIENT[torch.float32]


def distance_and_gradients(function: Callable[..., list[Tensor]], x: Levels, target: tuple[list[Tensor], ...]) -> list[Tensor]:
    """The distance of x's attention from `target`, (L, N), and its gradients for upstream gradients other than 1."""
    leaves = [a.detach().requires_grad_() for a in x]
    (rows,) = function(leaves, [(AttentionTerm(target[0], target[1], 0.7), 2.0)])
    upstream = torch.linspace(-1, 2, rows.numel()).view(rows.shape)
    return [rows.detach(), *torch.autograd.grad(rows, leaves, upstream.to(rows))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_distance_of_two_attentions(dtype, layout):
    x, teacher = (pyramid(SHAPES, DTYPES[dtype], layout, seed) for seed in (3, 4))
    target = reference_attention([a.double() for a in teacher], 0.7)
    packed = tuple([a.float() for a in part] for part in target)
    found = native_support.same_everywhere(lambda: distance_and_gradients(partial(fused_terms, "native"), x, packed))
    want = distance_and_gradients(reference_terms, [a.double() for a in x], target)
    assert relative_error(found[0], want[0]) < VALUE
    for got, expected, a in zip(found[1:], want[1:], x, strict=True):
        assert got.dtype == a.dtype and relative_error(got, expected) < GRADIENT[a.dtype]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_the_distance_of_an_attention_that_is_not_finite_is_nan(bad):
    x, teacher = pyramid([(3, 4, 5, 6)]), pyramid([(3, 4, 5, 6)], seed=1)
    x[0][1, 2, 4, 3] = bad
    for a in native_support.same_everywhere(
        lambda: distance_and_gradients(partial(fused_terms, "native"), x, reference_attention(teacher, 0.7))
    ):
        by_image = a.T if a.dim() == 2 else a
        assert by_image[::2].isfinite().all() and not by_image[1].isfinite().any()


def test_the_public_functions_take_the_kernels():
    x = pyramid(SHAPES[:2], torch.bfloat16)
    w = weights_of(x)
    set_backend("native")
    try:
        found = [functional.attention(x, 0.5), functional.weighted_channel_sum(x, w), functional.shared_read(x, w)]
        with pytest.raises(RuntimeError, match="a weight per element"):
            functional.weighted_channel_sum(x, x)
    finally:
        set_backend("auto")
    want = [fused_attention("native", x, 0.5), fused_sum("native", x, w), fused_read("native", x, w, "raw", "abs", 0.5)]
    assert all(torch.equal(a, b) for parts, others in zip(found, want, strict=True) for a, b in zip(flat(parts), flat(others), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_schemas_and_fakes(layout):
    x = pyramid(SHAPES[1:3], torch.float16, layout)
    w = torch.cat([v.flatten() for v in weights_of(x)])
    tests = ("test_schema", "test_faketensor")
    spatial, channel = torch.ops.kdkernels.attention("native", x, 0.5)
    arguments = {
        "attention": (x, 0.5),
        "attention_backward": (x, spatial, channel, spatial, channel, 0.5),
        "weighted_channel_sum": (x, w, True),
        "weighted_channel_sum_backward": (x, w, spatial, True),
        "shared_read": (x, w, False, 0.5),
    }
    for name, given_arguments in arguments.items():
        operator = getattr(torch.ops.kdkernels, name).default
        assert torch.library.opcheck(operator, ("native", *given_arguments), test_utils=tests) == dict.fromkeys(tests, "SUCCESS")
