"""The kernels of `logit_bce` and `logit_kl` against the loops and the reference in float64: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import logit_support
import pytest
import torch
from all_kernels import on_all_kernels, poisoned, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from native_support import needs_library, same_everywhere
from oracle.compare import assert_close
from torch import Tensor

from kdkernels import functional, set_backend
from kdkernels.reference.logit_bce import logit_bce
from kdkernels.reference.logit_kl import logit_kl

REFERENCES = {"logit_bce": logit_bce, "logit_kl": logit_kl}
#: Every power that has a kernel of its own and one that has none; LD's boxes, its classes, and a block a channel.
CALLS = [
    *(("logit_bce", (beta,)) for beta in (0.0, 1.0, 2.0, 0.5)),
    *(("logit_kl", options) for options in ((10.0, 4), (2.0, 1), (0.5, 2))),
]
of_every_call = pytest.mark.parametrize(("name", "options"), CALLS, ids=str)
of_both = pytest.mark.parametrize(("name", "options"), [CALLS[1], CALLS[4]], ids=str)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def chosen(request: pytest.FixtureRequest) -> Iterator[None]:
    """Chooses the backend that a test is parametrised with."""
    set_backend(request.getfixturevalue("backend"))
    yield
    set_backend("auto")


def weights_of(s: list[Tensor]) -> list[Tensor]:
    return [x.clamp_min(0) for x in pyramid([(a.shape[0], *a.shape[2:]) for a in s], seed=40, device=s[0].device.type)]


def check(name: str, s: list[Tensor], t: list[Tensor], weight: list[Tensor] | None, *options: Any, backend: str) -> list[Tensor]:
    """Rows and gradients, whose strides and type must be s's, against the reference in float64; returns all."""
    wide_s, wide_t = ([x.detach().double().cpu().contiguous() for x in levels] for levels in (s, t))
    wide = [x.requires_grad_() for x in wide_s]
    want = REFERENCES[name](wide, wide_t, None if weight is None else [x.double().cpu() for x in weight], *options)
    upstream = torch.rand(want.shape, generator=torch.Generator().manual_seed(7)) + 0.5
    wanted = torch.autograd.grad(want, wide, upstream.double())
    leaves = [x.detach().requires_grad_() for x in s]
    with poisoned(backend):
        rows = getattr(functional, name)(leaves, t, weight, *options)
        gradients = torch.autograd.grad(rows, leaves, upstream.to(rows.device))
    assert rows.dtype == torch.float32
    assert ((rows.double().cpu() - want).abs() <= 2e-5 * want.abs() + 1e-37).all()
    for got, expected, x in zip(gradients, wanted, s, strict=True):
        assert got.dtype == x.dtype and got.stride() == torch.empty_like(x).stride()
        assert relative_error(got, expected) < rounding(backend, x.device.type, x.dtype) + 2e-5
    return [rows.detach(), *gradients]


@on_all_kernels
@of_every_call
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradient(backend, device, dtype, layout, name, options):
    """The loops' numbers, with weights and without, of dozens of bins and of several."""
    for weighted in (True, False):
        rows = logit_support.check(
            name,
            *logit_support.given(1, weighted=weighted),
            *options,
            dtype=DTYPES[dtype],
            laid_out=lambda x: x.contiguous(memory_format=LAYOUTS[layout]),
            device=device,
            rounding=rounding(backend, device, DTYPES[dtype]),
        )
        assert rows.shape == (3, 2)


@on_all_kernels
@of_every_call
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_many_tiles(backend, device, name, options, layout):
    """More pixels than a tile has lines, and more channels than it has bins where they are no distribution."""
    shapes = [(1, 8, 13, 17), (1, 300, 3, 5), (1, 4, 1, 1)]
    s, t = (pyramid(shapes, torch.bfloat16, layout, seed, device) for seed in (1, 2))
    results = check(name, s, t, weights_of(s), *options, backend=backend)
    again = check(name, s, t, weights_of(s), *options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@needs_library
@pytest.mark.parametrize("backend", ["native"])
@of_every_call
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_bands_of_several_images(backend, name, options, layout):
    """More pixels than two bands of the CPU have, by all instructions and with any number of threads."""
    shapes = [(2, 8, 37, 41), (2, 4, 33, 35), (2, 8, 1, 1)]
    s, t = (pyramid(shapes, layout=layout, seed=seed) for seed in (1, 2))
    results = same_everywhere(lambda: check(name, s, t, weights_of(s), *options, backend=backend))
    assert [x.shape for x in results] == [(3, 2), *shapes]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_distributions_of_more_bins_than_triton_takes(backend, device, layout):
    s, t = (pyramid([(2, 4100, 1, 3), (2, 4, 1, 2)], layout=layout, seed=seed, device=device) for seed in (15, 16))
    if backend == "triton":
        with pytest.raises(RuntimeError, match="cannot run logit_kl: it takes distributions of at most 4096 bins, got 4100"):
            functional.logit_kl(s, t)
    else:
        check("logit_kl", s, t, None, 2.0, 1, backend=backend)
    # Two distributions of half as many.
    assert (check("logit_kl", s, t, None, 2.0, 2, backend=backend)[0] > 0).all()


@on_all_kernels
@of_both
@pytest.mark.parametrize("anchors", [1, 3])
def test_logits_of_anchors_as_a_head_makes_them(backend, device, name, options, anchors):
    """(N, A, K), a view as a pyramid."""
    s, t = ([torch.randn(2, 35 * anchors, 12, device=device).half().transpose(1, 2).unsqueeze(3)] for _ in range(2))
    results = check(name, s, t, weights_of(s), *options, backend=backend)
    assert results[1].stride()[1:3] == (1, 12)


@on_all_kernels
@of_both
@settings(max_examples=6)
@given(
    images=st.integers(1, 2),
    sizes=st.lists(st.tuples(*[st.integers(1, most) for most in (9, 14, 19)]), min_size=1, max_size=3),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=6, max_size=6),
    weighted=st.booleans(),
)
def test_any_shapes_in_any_layouts(backend, device, name, options, images, sizes, layouts, weighted):
    shapes = [(images, 4 * bins, h, w) for bins, h, w in sizes]
    s = [pyramid([shape], layout=layout, seed=3, device=device)[0] for shape, layout in zip(shapes, layouts, strict=False)]
    t = [pyramid([shape], layout=layout, seed=4, device=device)[0] for shape, layout in zip(shapes, layouts[3:], strict=False)]
    results = check(name, s, t, weights_of(s) if weighted else None, *options, backend=backend)
    assert len(results) == 1 + len(sizes)


@on_all_kernels
@of_both
def test_nine_levels_slices_unaligned_starts_and_mixed_types(backend, device, name, options):
    s = pyramid([(1, 4, 1 + k, 5) for k in range(9)], seed=3, device=device)
    s[0] = pyramid([(3, 4, 6, 10)], seed=4, device=device)[0][1:2, :, ::2, 3:8]
    s[1] = torch.randn(1 + 4 * 2 * 5, device=device)[1:].view(1, 4, 2, 5)
    types = [torch.float16, torch.float32, torch.bfloat16]
    t = [x.to(types[k % 3]) for k, x in enumerate(pyramid([x.shape for x in s], seed=5, device=device))]
    s[2:4] = [s[2].half(), s[3].bfloat16()]
    results = check(name, s, t, weights_of(s), *options, backend=backend)
    assert len(results) == 10 and t[0].dtype != s[0].dtype


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_channel(backend, device, layout):
    s, t = (pyramid([(2, 1, 5, 7), (2, 1, 1, 1)], layout=layout, seed=seed, device=device) for seed in (6, 7))
    assert (check("logit_bce", s, t, weights_of(s), 1.0, backend=backend)[0] >= 0).all()
    assert check("logit_kl", s, t, weights_of(s), 1.0, 1, backend=backend)[0].tolist() == [[0.0, 0.0]] * 2


@on_all_kernels
@of_both
def test_no_images(backend, device, name, options):
    s = [x.requires_grad_() for x in pyramid([(0, 4, 2, 2), (0, 4, 1, 1)], device=device)]
    rows = getattr(functional, name)(s, [x.detach() for x in s], None, *options)
    assert rows.shape == (2, 0)
    assert [x.shape for x in torch.autograd.grad(rows.sum(), s)] == [x.shape for x in s]
    assert getattr(functional, name)([], [], None, *options).shape[0] == 0


@on_all_kernels
@of_every_call
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_logits_show_in_their_row_alone(backend, device, name, options, layout, bad, side):
    pair = [pyramid([(3, 4, 5, 6)], layout=layout, seed=seed, device=device)[0] for seed in (8, 9)]
    pair[side][1, 2, 4, 3] = bad
    x = pair[0].requires_grad_()
    rows = getattr(functional, name)([x], [pair[1]], None, *options)
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    # To a teacher that is infinitely sure the cross-entropy of a finite logit is finite.
    sure = name == "logit_bce" and side == 1 and bad == INF
    assert rows.isfinite().tolist() == [[True, sure, True]]
    assert gradient[::2].isfinite().all()
    if name == "logit_kl" or bad != INF:
        assert not gradient[1].isfinite().all()


@on_all_kernels
@of_every_call
def test_large_logits(backend, device, name, options):
    s = torch.tensor([200.0, 0.0, -300.0, 500.0], device=device).view(1, 4, 1, 1)
    assert all(x.isfinite().all() for x in check(name, [s], [s.flip(1)], None, *options, backend=backend))


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_distributions_have_no_divergence_and_no_gradient(backend, device, layout):
    x = pyramid([(2, 12, 3, 3)], layout=layout, seed=10, device=device)
    rows, gradient = check("logit_kl", x, [a.clone() for a in x], None, 2.0, 3, backend=backend)
    assert rows.tolist() == [[0.0, 0.0]] and not gradient.any()


@on_all_kernels
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_near_distributions_keep_their_digits(backend, device, temperature):
    t = pyramid([(2, 16, 3, 5)], seed=11, device=device)
    s = [x + 1e-2 * temperature * y for x, y in zip(t, pyramid([(2, 16, 3, 5)], seed=12, device=device), strict=True)]
    assert (check("logit_kl", s, t, None, temperature, 1, backend=backend)[0] < 1e-2).all()


@on_all_kernels
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("side", [-1, 1])
def test_sure_and_near_networks_keep_their_digits(backend, device, beta, side):
    t = [side * (x.abs() + 8) for x in pyramid([(2, 16, 3, 5)], seed=13, device=device)]
    s = [x + 1e-2 * y for x, y in zip(t, pyramid([(2, 16, 3, 5)], seed=14, device=device), strict=True)]
    assert (check("logit_bce", s, t, None, beta, backend=backend)[0] < 1).all()


@on_all_kernels
def test_a_bin_that_the_teacher_rules_out_costs_nothing(backend, device):
    s, t = torch.tensor([0.0, 0.0, 1.0], device=device), torch.tensor([0.0, 0.0, -INF], device=device)
    x = s.view(1, 3, 1, 1).requires_grad_()
    row = functional.logit_kl([x], [t.view(1, 3, 1, 1)])
    (gradient,) = torch.autograd.grad(row.sum(), x)
    p = s.double().cpu().softmax(0)
    assert_close(row[0, 0], -torch.log(2 * p[0]).numpy(), 1e-6)
    assert_close(gradient.flatten(), (p - torch.tensor([0.5, 0.5, 0.0])).numpy(), 1e-6)
    assert row.isfinite().all() and gradient[0, 2] > 0


@on_all_kernels
@of_both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_and_fakes(backend, device, name, options, layout):
    s, t = (pyramid([(2, 8, 3, 5), (2, 4, 1, 1)], torch.float16, layout, seed, device) for seed in (1, 2))
    forward, backward = (getattr(torch.ops.kdkernels, operator).default for operator in (name, f"{name}_backward"))
    weight = torch.rand(2 * 3 * 5 + 2, device=device)
    rows = forward(backend, s, t, weight, *options)
    tests = ("test_schema", "test_faketensor")
    results = [
        torch.library.opcheck(forward, (backend, s, t, weight, *options), test_utils=tests),
        torch.library.opcheck(backward, (backend, rows, s, t, None, *options), test_utils=tests),
    ]
    assert all(result == dict.fromkeys(tests, "SUCCESS") for result in results)


@on_all_kernels
@of_both
def test_weights_in_float64_are_refused(backend, device, name, options):
    x = pyramid([(1, 4, 2, 2)], device=device)
    with pytest.raises(RuntimeError, match="the weights are in float64 or on another device"):
        getattr(functional, name)(x, x, [torch.ones(1, 2, 2, dtype=torch.float64, device=device)], *options)
