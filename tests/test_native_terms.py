"""The terms operators on the native kernels: large gradients, groups of images, several imitations, upstream and arriving gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from fused_support import GRAINS, INF, NAN, SMALL, called, evaluated, of_shapes, of_the_tap, wide
from levels import DTYPES, pyramid, relative_error
from native_support import needs_library, poisoned, same_bits, same_everywhere
from terms_support import Wanted, doubles, kernels, laid_out, terms, terms_error, with_arriving, with_gradients
from torch import Tensor

from kdkernels import BMFILoss, GKDLoss, backend, set_backend
from kdkernels.ops.terms import MapTerm, fused_vjp
from kdkernels.reference.terms import terms as reference
from kdkernels.reference.terms import terms_vjp as reference_vjp

pytestmark = needs_library
SHAPES = [(2, 7, 5, 9), (2, 16, 3, 4), (2, 3, 1, 1)]
#: More than 8 MB in bf16 already, from which on gradients are streamed past the caches, in rows that begin anywhere; of several bands.
#: Student and teacher of an image are more than half of the 16 MB, up to which images are taken together.
LARGE = [(2, 131, 161, 129), (2, 5, 7, 9)]


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


def check(features: list[Tensor], wanted: Wanted, upstream: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Held against the reference in float64; upstream None: 1, for which there may be a gradient from the forward pass."""
    given = [torch.ones(len(features), features[0].shape[0]) for _ in wanted] if upstream is None else upstream
    got = same_everywhere(lambda: with_gradients(kernels, features, wanted, given))
    want = with_gradients(reference, [x.double() for x in features], doubles(wanted), given)
    assert terms_error(got, want, [x.dtype for x in features]) < 1
    assert [g.stride() for g in got[len(wanted) :]] == [torch.empty_like(x).stride() for x in features]
    return got


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("imitations", [1, 2])
def test_large_gradients_of_images_in_groups(imitations: int, dtype: str, layout: str) -> None:
    """Each image has the bits that it has alone, where all fits in one group and nothing is streamed."""
    features, teacher = (laid_out(LARGE, dtype, layout, seed) for seed in (1, 2))
    assert sum(x.nbytes for x in features) > 1 << 23 > sum(x[:1].nbytes for x in features) or dtype == "fp32"
    wanted = terms(LARGE, teacher, imitations)
    got = with_gradients(kernels, features, wanted, [torch.ones(2, 2)] * len(wanted))
    if imitations == 1:
        want = with_gradients(reference, [x.double() for x in features], doubles(wanted), [torch.ones(2, 2)] * len(wanted))
        assert terms_error(got, want, [x.dtype for x in features]) < 1
    for n in range(2):
        alone = with_gradients(kernels, [x[n : n + 1] for x in features], of_image(wanted, n), [torch.ones(2, 1)] * len(wanted))
        rows = len(wanted)
        assert all(same_bits(a[:, n : n + 1], b) for a, b in zip(got[:rows], alone[:rows], strict=True))
        assert all(same_bits(a[n : n + 1], b) for a, b in zip(got[rows:], alone[rows:], strict=True))


def of_image(wanted: Wanted, n: int) -> Wanted:
    """The terms of image n of two alone. A map's distance is a mean over the images."""
    made: dict[int, list[Tensor]] = {}

    def own(part: Any) -> Any:
        # What terms share they share still.
        return made.setdefault(id(part), [x[n : n + 1] for x in part]) if isinstance(part, list) else part

    return [(type(term)(*map(own, term)), 0.5 if isinstance(term, MapTerm) else 1.0) for term, _ in wanted]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd address", "gaps"])
def test_large_gradients_are_the_same_with_all_instructions_and_threads(layout: str, dtype: str) -> None:
    """Streaming is done by instructions that only some of them have."""
    shapes = [(1, 130, 131, 129), (1, 5, 7, 9)]
    features, teacher = (laid_out(shapes, dtype, layout, seed) for seed in (1, 2))
    wanted = terms(shapes, teacher, 1)
    found = same_everywhere(lambda: with_gradients(kernels, features, wanted, [torch.full((2, 1), 0.5)] * 3))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("imitations", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_imitations(dtype: str, imitations: int, spatial: bool) -> None:
    for layout, teacher_layout in itertools.product(("contiguous", "channels_last", "transposed"), repeat=2):
        features, teacher = laid_out(SHAPES, dtype, layout, 1), laid_out(SHAPES, "fp32", teacher_layout, 2)
        wanted = terms(SHAPES, teacher, imitations, 0.7, spatial)
        check(features, wanted)
        rows = check(features, wanted, pyramid([(3, 2)] * len(wanted), seed=5))
        assert len(rows) == len(wanted) + len(SHAPES)


@pytest.mark.parametrize("shape", [(), (3, 2), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_that_are_tensors(dtype: str, shape: tuple[int, ...]) -> None:
    features, teacher = (laid_out(SHAPES, dtype, "contiguous", seed) for seed in (1, 2))
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(6)) + 2.0
    wanted = terms(SHAPES, teacher, 1, factor)
    rows = check(features, wanted)
    check(features, wanted, pyramid([(3, 2)] * 3, seed=5))
    plain = kernels(features, terms(SHAPES, teacher, 1))
    assert all(relative_error(a, b * factor) < 1e-6 for a, b in zip(rows[:3], plain, strict=True))
    # Its values come from the pass that writes the gradient, or the one that does not.
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(rows[:3], kernels(features, wanted), strict=True))


@pytest.mark.parametrize("arriving", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_arrive_are_added_whatever_their_type(dtype: str, arriving: str) -> None:
    features, teacher = laid_out(SHAPES, dtype, "channels_last", 1), laid_out(SHAPES, "bf16", "contiguous", 2)
    wanted, up = terms(SHAPES, teacher, 1, 0.3), pyramid([(3, 2)] * 3, seed=5)
    for layout, missing in itertools.product(("contiguous", "channels_last", "gaps"), (None, 1)):
        given: list[Tensor | None] = list(laid_out(SHAPES, arriving, layout, 8))
        if missing is not None:
            given[missing] = None

        got = same_everywhere(partial(with_arriving, partial(fused_vjp, "native"), features, wanted, given, up))
        exact = [None if x is None else x.double() for x in given]
        want = with_arriving(reference_vjp, [x.double() for x in features], doubles(wanted), exact, [x.double() for x in up])
        assert [g.dtype for g in got[3:]] == [x.dtype for x in features]
        assert terms_error(got, want, [x.dtype for x in features]) < 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_passes_accumulate(dtype: str) -> None:
    case = of_shapes(SMALL, layouts=("contiguous", "channels_last", "gaps"), dtypes=(dtype,))
    leaves, values = called({"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.4, gamma=0.3)}, case, "native")
    total = sum(values)
    with poisoned():
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        total.backward(retain_graph=True)
        once = [x.grad.clone() for x in leaves]
        total.backward()
    assert all(same_bits(a, b) for a, b in zip(first, once, strict=True))
    assert all(same_bits(x.grad, a + a) for x, a in zip(leaves, once, strict=True))


@pytest.mark.parametrize("d", [NAN, INF, -INF, 0.0, 1.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_upstream_gradients_of_the_sum(dtype: str, d: float) -> None:
    """In the first backward pass, which may have its gradient from the forward pass, and in a second one."""
    leaves, values = called({"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.4)}, of_shapes(SMALL, dtypes=(dtype,)), "native")
    total = sum(values)
    first, second = (torch.autograd.grad(total, leaves, torch.tensor(d), retain_graph=True) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    finite = [bool(g.isfinite().any()) for g in first]
    assert finite == [d in (0.0, 1.0)] * 3 and all(bool(g.any()) == (d != 0) for g in first)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_in_teacher_and_arriving_gradient(bad: float) -> None:
    features, teacher, arriving = (laid_out(SHAPES, "fp32", layout, k) for k, layout in enumerate(["contiguous", "gaps", "channels_last"]))
    arriving[0][1, 2, 3, 4] = bad
    teacher[1][0, 2, 1, 1] = bad
    rows, vjp = fused_vjp("native", features, terms(SHAPES, teacher, 1))
    gradients: list[Any] = vjp([torch.ones(3, 2)] * 3, arriving)
    assert [int((~row.isfinite()).sum()) for row in rows] == [0, 0, 1] and not rows[2][1, 0].isfinite()
    assert [(~g.isfinite()).nonzero().tolist() for g in gradients] == [[[1, 2, 3, 4]], [[0, 2, 1, 1]], []]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inline_in_any_layouts(dtype: str) -> None:
    """The gradients that pass the tap are of other layouts than the features."""
    losses = {"gkd": GKDLoss(), "bmfi": BMFILoss(alpha=0.5, gamma=0.3)}
    case = of_shapes(SMALL, layouts=("channels_last", "contiguous", "transposed"), dtypes=(dtype,))
    case["student_gradients"] = [1e-3 * x.to(DTYPES[dtype]).contiguous() for x in case["student_gradients"]]
    found = {name: of_the_tap(losses, given, name, 1.0) for name, given in (("native", case), ("reference", wide(case)))}
    assert all(g.dtype == x.dtype for g, x in zip(found["native"], case["student_features"], strict=True))
    assert terms_error(found["native"], found["reference"], [DTYPES[dtype]] * 3) < 1


def test_auto_takes_the_kernels_and_the_reference_what_they_cannot() -> None:
    case = of_shapes(SMALL)
    losses = {"gkd": GKDLoss(), "bmfi": BMFILoss(**GRAINS)}
    native, auto = (evaluated(losses, case, name) for name in ("native", "auto"))
    assert backend.backend_info()["native"]["active"]
    assert all(same_bits(a, b) for a, b in zip([*native[0], *native[1]], [*auto[0], *auto[1]], strict=True))
    with pytest.raises(RuntimeError, match="does not take float64"):
        evaluated(losses, wide(case), "native")
    values, gradients = evaluated(losses, wide(case), "auto")
    assert terms_error(auto[0] + auto[1], values + gradients, [torch.float32] * 3) < 1
