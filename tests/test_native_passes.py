"""The native read and write passes: around their bands of 2048 pixels and vectors of 16, every group of terms, what is streamed."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from fused_support import LAYOUTS, NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, pyramid, relative_error
from native_support import GRADIENT, VALUE, needs_library, same_bits, same_everywhere
from terms_support import Wanted, doubles, kernels, laid_out, terms, terms_error, with_arriving, with_gradients
from torch import Tensor

from kdkernels.ops.channel_kl import fused as fused_kl
from kdkernels.ops.channel_mean import fused as fused_mean
from kdkernels.ops.correlation import fused as fused_correlation
from kdkernels.ops.feature_imitation import fused as fused_imitation
from kdkernels.ops.terms import fused_vjp
from kdkernels.ops.weighted_channel_sum import fused as fused_sum
from kdkernels.reference.channel_kl import channel_kl as reference_kl
from kdkernels.reference.channel_mean import channel_mean as reference_mean
from kdkernels.reference.correlation import correlation as reference_correlation
from kdkernels.reference.terms import terms as reference
from kdkernels.reference.terms import terms_vjp as reference_vjp

pytestmark = needs_library
#: Maps of a pixel less than a band, a band, a pixel more, two bands and one more; rows of no, one and two whole vectors.
AROUND_BANDS = [(1, 3, 23, 89), (1, 17, 32, 64), (1, 5, 3, 683), (1, 1, 64, 64), (1, 4, 17, 241)]
MIXED = [(2, 7, 5, 9), (2, 16, 3, 4), (2, 3, 1, 1), (2, 33, 2, 17)]


def mean_and_gradients(x: list[Tensor], mode: str, function: Any) -> list[Tensor]:
    """The means, and the gradients of their product with random numbers."""
    leaves = [level.detach().requires_grad_() for level in x]
    means = function(leaves, mode)
    up = [d.to(m) for d, m in zip(pyramid([m.shape for m in means], seed=9), means, strict=True)]
    return [*(m.detach() for m in means), *torch.autograd.grad(means, leaves, up)]


def native_mean(x: list[Tensor], mode: str) -> list[Tensor]:
    return fused_mean("native", x, mode)


def check_mean(x: list[Tensor], mode: str) -> list[Tensor]:
    got = same_everywhere(lambda: mean_and_gradients(x, mode, native_mean))
    want = mean_and_gradients([level.double() for level in x], mode, reference_mean)
    gradients = got[len(x) :]
    assert [g.stride() for g in gradients] == [torch.empty_like(level).stride() for level in x]
    assert terms_error(got, want, [level.dtype for level in x]) < 1
    return got


@pytest.mark.parametrize("mode", ["signed", "abs"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_constants_of_channels(dtype: str, layout: str, mode: str) -> None:
    assert len(check_mean(laid_out(MIXED, dtype, layout, 1), mode)) == 2 * len(MIXED)
    x = laid_out(AROUND_BANDS, dtype, layout, 2)
    assert all(g.isfinite().all() for g in check_mean(x, mode))


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(1, 90)), min_size=1, max_size=4),
    images=st.integers(0, 3),
    kinds=st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(LAYOUTS))), min_size=4, max_size=4),
    mode=st.sampled_from(["signed", "abs"]),
)
def test_any_levels(shapes: Any, images: int, kinds: Any, mode: str) -> None:
    x = [laid_out([(images, *shape)], *kind, 1)[0] for shape, kind in zip(shapes, kinds, strict=False)]
    means = check_mean(x, mode)[: len(x)]
    assert [m.shape for m in means] == [(images, shape[0]) for shape in shapes]


#: Which terms there are: activation of a map, an attention, and channel and spatial weights of an imitation.
GROUPS = [group for group in itertools.product((None, "raw", "abs"), (False, True), (None, (0, 0), (0, 1), (1, 0), (1, 1))) if any(group)]


def of_group(group: Any, teacher: list[Tensor]) -> Wanted:
    """Such terms, each with a factor of its own."""
    activation, attends, weights = group
    imitation = weights is not None
    (map_, *_), (attention, _), *imitations = terms([x.shape for x in teacher], teacher, int(imitation))
    wanted: Wanted = [(map_._replace(activation=activation), 0.3)] if activation else []
    wanted += [(attention, torch.tensor([[0.5, -2.0]]))] if attends else []
    if imitation:
        ((one, _),) = imitations
        channel, spatial = weights
        wanted.append((one._replace(channel=one.channel if channel else None, spatial=one.spatial if spatial else None), -0.7))
    return wanted


@pytest.mark.parametrize("arrives", [False, True], ids=["", "arriving"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_group_of_terms(group: Any, arrives: bool) -> None:
    """Of levels in types and layouts of their own; what arrives is of a third."""
    kinds = [("fp32", "contiguous"), ("bf16", "channels_last"), ("fp16", "contiguous"), ("fp32", "channels_last")]
    features = [laid_out([shape], *kind, 1)[0] for shape, kind in zip(MIXED, kinds, strict=True)]
    teacher = laid_out(MIXED, "bf16", "gaps", 2)
    arriving = list(laid_out(MIXED, "fp16", "transposed", 3)) if arrives else [None] * len(MIXED)
    wanted = of_group(group, teacher)
    up = pyramid([(len(MIXED), 2)] * len(wanted), seed=5)
    got = same_everywhere(lambda: with_arriving(partial(fused_vjp, "native"), features, wanted, arriving, up))
    exact: Any = [[None if x is None else x.double() for x in part] for part in (features, arriving, up)]
    want = with_arriving(reference_vjp, exact[0], doubles(wanted), exact[1], exact[2])
    assert terms_error(got, want, [x.dtype for x in features]) < 1
    assert [g.stride() for g in got[len(wanted) :]] == [torch.empty_like(x).stride() for x in features]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_around_bands(layout: str, dtype: str) -> None:
    features, teacher = laid_out(AROUND_BANDS, dtype, layout, 1), laid_out(AROUND_BANDS, "fp32", layout, 2)
    for imitations in (1, 2):
        wanted = terms(AROUND_BANDS, teacher, imitations)
        up = [torch.ones(len(AROUND_BANDS), 1)] * len(wanted)
        got = same_everywhere(partial(with_gradients, kernels, features, wanted, up))
        want = with_gradients(reference, [x.double() for x in features], doubles(wanted), up)
        assert terms_error(got, want, [x.dtype for x in features]) < 1


#: Of two pyramids channel by channel: kernels, reference and options.
COMPARED = {
    "channel_kl": (fused_kl, reference_kl, (2.0, True)),
    "cross_entropy": (fused_kl, reference_kl, (2.0, False)),
    "correlation": (fused_correlation, reference_correlation, (1e-6,)),
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_pyramids_channel_by_channel(dtype: str, layout: str, name: str) -> None:
    """Several bands of several images, and levels smaller than a vector."""
    shapes = [(2, 19, 47, 61), *MIXED]
    s, t = laid_out(shapes, dtype, layout, 1), laid_out(shapes, "fp32", layout, 2)
    fused, exact, options = COMPARED[name]

    def rows_and_gradients(levels: list[Tensor], function: Any) -> list[Tensor]:
        leaves = [level.detach().requires_grad_() for level in levels]
        rows = function(leaves, [x.to(levels[0].dtype) if levels[0].dtype == torch.float64 else x for x in t], *options)
        # As large as fp16 needs it of a gradient that is divided by all values of a level.
        return [rows.detach(), *torch.autograd.grad(1e3 * rows.sum(), leaves)]

    rows, *gradients = same_everywhere(lambda: rows_and_gradients(s, partial(fused, "native")))
    wanted, *of_gradients = rows_and_gradients([x.double() for x in s], exact)
    assert relative_error(rows, wanted) < VALUE
    # Of a single pixel nothing is left.
    large = [k for k, shape in enumerate(shapes) if shape[2] * shape[3] > 1]
    assert max(relative_error(gradients[k], of_gradients[k]) for k in large) < GRADIENT[DTYPES[dtype]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_streamed_is_what_is_not(dtype: str, layout: str) -> None:
    """A gradient of 8 MB, from which on it is streamed, and one just smaller: the levels that they share have the same bits."""
    rows = (1 << 23) // (64 * 128 * DTYPES[dtype].itemsize)
    large = laid_out([(1, 128, rows - 1, 64), (1, 64, 2, 64)], dtype, layout, 1)
    small = [large[0], LAYOUTS[layout](large[1][:, :, :1].contiguous())]
    assert sum(x.nbytes for x in large) == 1 << 23 > sum(x.nbytes for x in small)
    streamed, other = (mean_and_gradients(x, "abs", native_mean)[2] for x in (large, small))
    want = mean_and_gradients([large[0].double()], "abs", reference_mean)[1]
    assert same_bits(streamed, other) and relative_error(streamed, want) < GRADIENT[streamed.dtype]


@pytest.mark.parametrize("source", ["features", "teacher"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_bad_element_of_an_imitation_is_one_in_the_gradient(layout: str, source: str) -> None:
    """Behind whole vectors, in the last of several bands, and nowhere else."""
    shapes = [(2, 19, 47, 61), (2, 5, 3, 5)]
    given = {"features": laid_out(shapes, "bf16", layout, 1), "teacher": laid_out(shapes, "fp32", "contiguous", 2)}
    given[source][0][1, 18, 46, 60] = NAN
    (imitation,) = terms(shapes, given["teacher"], 1)[2:]
    rows, gradient, other = with_gradients(kernels, given["features"], [imitation], [torch.ones(2, 2)])
    assert (~rows.isfinite()).nonzero().tolist() == [[0, 1]]
    assert (~gradient.isfinite()).nonzero().tolist() == [[1, 18, 46, 60]] and other.isfinite().all()


@pytest.mark.parametrize("mode", ["signed", "abs"])
def test_a_level_without_images_and_levels_of_one_element(mode: str) -> None:
    assert [x.numel() for x in check_mean(laid_out([(0, 4, 3, 5), (0, 2, 1, 1)], "fp16", "channels_last", 1), mode)] == [0] * 4
    one = laid_out([(1, 1, 1, 1)], "fp32", "contiguous", 3)
    mean, _ = check_mean(one, mode)
    assert mean.item() == (one[0].abs() if mode == "abs" else one[0]).item()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_long_sums_of_equal_numbers_lose_little(layout: str) -> None:
    """All rounded the same way: a chain of additions in fp32 would be off by its length."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.full((1, 512, 64, 64), 0.7).contiguous(memory_format=memory_format)
    target, leaf = [torch.zeros_like(x)], x.clone().requires_grad_()
    number = x[0, 0, 0, 0].double()
    errors = {
        "imitation": fused_imitation("native", [leaf], target, None, None).detach().double() / (x.numel() * number**2) - 1,
        "without gradient": fused_imitation("native", [x], target, None, None).double() / (x.numel() * number**2) - 1,
        "mean": fused_mean("native", [x], "signed")[0].double() / number - 1,
        "channels": fused_sum("native", [x], [torch.ones(1, 512)])[0][0].double() / (512 * number) - 1,
    }
    for name, error in errors.items():
        assert error.abs().max() < 1e-5, name
