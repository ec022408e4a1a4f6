"""`spatial_pool` by fused kernels against the reference in float64: values, both gradients, and what the operators tell torch of them."""

from __future__ import annotations

import pytest
import torch
from all_kernels import on_all_kernels, poisoned, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from native_support import needs_library, same_everywhere

from kdkernels import backend as backends
from kdkernels import functional
from kdkernels.ops.spatial_pool import NORMALIZERS, fused
from kdkernels.pyramid import pack
from kdkernels.reference.spatial_pool import spatial_pool as reference

SHAPES = [(2, 20, 14, 19), (2, 3, 7, 11), (2, 16, 4, 8), (2, 1, 1, 1)]
TOLERANCE = 2e-6
CHECKS = ("test_schema", "test_faketensor")


def maps_of(x, seed=3, dtype=torch.float32, signed=True):
    """One of each level, of a sum away from 0 and of entries of both signs."""
    shapes = [(level.shape[0], *level.shape[2:]) for level in x]
    made = [a + 2.5 for a in pyramid(shapes, seed=seed, device=x[0].device)]
    return [(a if signed else a.abs()).to(dtype) for a in made]


def check(backend, x, a, normalize):
    """Values and the gradients of x and a, whose strides and types they must have, against the reference; returns all."""
    device, results = x[0].device.type, []
    for function, wide in ((lambda *args: fused(backend, *args), False), (reference, True)):
        levels, maps = ([(v.detach().double() if wide else v.detach()).requires_grad_() for v in values] for values in (x, a))
        with poisoned(backend):
            means = function(levels, maps, normalize)
            up = pyramid([m.shape for m in means], torch.float64 if wide else torch.float32, seed=9, device=x[0].device)
            gradients = torch.autograd.grad(means, [*levels, *maps], up)
        results.append(([m.detach() for m in means], gradients[: len(x)], gradients[len(x) :]))
    (means, of_x, of_a), (means64, of_x64, of_a64) = results
    for got, want in zip(means, means64, strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape and relative_error(got, want) < TOLERANCE
    for got, want, level in zip(of_x, of_x64, x, strict=True):
        assert got.dtype == level.dtype and got.stride() == torch.empty_like(level).stride()
        assert relative_error(got, want) < rounding(backend, device, level.dtype) + TOLERANCE
    for got, want, level in zip(of_a, of_a64, a, strict=True):
        assert got.dtype == level.dtype
        # Of one pixel the gradient is what two equal sums leave of each other.
        assert level[0].numel() == 1 or relative_error(got, want) < rounding(backend, device, level.dtype) + 2e-5
    return [*means, *of_x, *of_a]


@on_all_kernels
@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_and_gradients(dtype, layout, normalize, backend, device):
    x = pyramid(SHAPES, dtype, layout, 1, device)
    assert len(check(backend, x, maps_of(x), normalize)) == 3 * len(SHAPES)


@on_all_kernels
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_seven_levels_of_several_types_and_strides(normalize, backend, device):
    x = pyramid([(2, 5, 4, k) for k in range(2, 9)], torch.float32, "channels_last", 2, device)
    x[1], x[6], x[3], x[2] = x[1].contiguous(), x[6][:, 1:4], x[3][:, :, ::2], x[2].half()
    a = maps_of(x, dtype=torch.bfloat16)
    a[0], a[4] = a[0].float(), a[4].transpose(1, 2).contiguous().transpose(1, 2)
    assert len(check(backend, x, a, normalize)) == 21


@on_all_kernels
@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_many_blocks(layout, normalize, backend, device):
    """More pixels than two blocks of a map or of the read pass take, beside more channels than a block has threads."""
    x = pyramid([(1, 2, 3, 6001), (1, 600, 1, 3)], layout=layout, device=device)
    assert all(result.isfinite().all() for result in check(backend, x, maps_of(x, signed=False), normalize))


@needs_library
@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_instructions_and_threads_make_no_difference(layout, normalize):
    """Several bands of several images."""
    x = pyramid([(2, 20, 37, 41), (2, 3, 7, 11)], layout=layout, device="cpu")
    assert len(same_everywhere(lambda: check("native", x, maps_of(x), normalize))) == 3 * len(x)


@on_all_kernels
@settings(max_examples=6)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3),
    layout=st.sampled_from(list(LAYOUTS)),
    normalize=st.sampled_from(NORMALIZERS),
)
def test_any_shape(backend, device, shapes, layout, normalize):
    x = [level + 3 for level in pyramid([(2, *shape) for shape in shapes], layout=layout, device=device)]
    assert len(check(backend, x, maps_of(x, signed=False), normalize)) == 3 * len(shapes)


@on_all_kernels
def test_a_map_without_a_sum_gives_zero_and_a_gradient_of_zero(backend, device):
    x, a = torch.randn(3, 2, 1, 2, device=device, requires_grad=True), torch.tensor([[[0.0, 0.0]], [[1.0, -1.0]], [[0.0, 2.0]]])
    a = a.to(device).requires_grad_()
    (mean,) = fused(backend, [x], [a], "mean")
    assert mean[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]] and torch.equal(mean[2], x[2, :, 0, 1])
    for gradient in torch.autograd.grad(mean.square().sum(), [x, a]):
        assert not gradient[:2].any() and gradient[2].any()


@on_all_kernels
def test_large_and_infinite_entries_of_a_softmax(backend, device):
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]] * 3, device=device)
    inf = float("inf")
    a = torch.tensor([[[-1e5, 1e5, 0.0]], [[-inf, -70000.0, -70000.0]], [[inf, 0.0, 0.0]]], device=device)
    (mean,) = fused(backend, [x], [a], "softmax")
    assert mean[:2].tolist() == [[2.0], [2.5]] and mean[2].isnan()
    (mean,) = fused(backend, [x], [torch.full_like(a, -inf)], "softmax")
    assert mean.isnan().all()


@on_all_kernels
@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite(poison, normalize, backend, device):
    """In x it reaches its channel's mean, also under a map of zeros; in a map or in the upstream gradient all that they are part of."""
    x = pyramid(SHAPES[:2], torch.bfloat16, device=device)
    a = maps_of(x)
    x[0][1, 7, 3, 4] = poison
    a[0][1] = 0
    means = pack(fused(backend, x, a, normalize))
    assert (~means.isfinite()).nonzero().flatten().tolist() == [20 + 7]
    a[1][0, 2, 3] = poison
    assert not fused(backend, x, a, normalize)[1][0].isfinite().any()
    leaves = [level.requires_grad_() for level in (*pyramid(SHAPES[:2], device=device), *maps_of(x))]
    means = fused(backend, leaves[:2], leaves[2:], normalize)
    up = [torch.zeros_like(mean) for mean in means]
    up[0][0, 2] = poison
    gradients = torch.autograd.grad(means, leaves, up)
    assert not gradients[0][0, 2].isfinite().any() and gradients[0][1].isfinite().all() and gradients[1].isfinite().all()
    assert not gradients[2][0].isfinite().any() and gradients[2][1].isfinite().all() and gradients[3].isfinite().all()


@on_all_kernels
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_only_what_is_wanted_is_differentiated(normalize, backend, device):
    x, a = pyramid(SHAPES[:2], device=device), maps_of(pyramid(SHAPES[:2], device=device))
    both = check(backend, x, a, normalize)[2:]
    for wanted in (0, 1):
        leaves = [[v.detach().requires_grad_(k == wanted) for v in values] for k, values in enumerate((x, a))]
        means = fused(backend, *leaves, normalize)
        gradients = torch.autograd.grad(means, leaves[wanted], pyramid([m.shape for m in means], seed=9, device=device))
        assert all(torch.equal(got, want) for got, want in zip(gradients, both[2 * wanted : 2 * wanted + 2], strict=True))


@on_all_kernels
def test_two_backwards_are_bit_equal_and_only_once_differentiable(backend, device):
    x = [level.requires_grad_() for level in pyramid(SHAPES, device=device)]
    a = [level.requires_grad_() for level in maps_of(x)]
    total = sum(mean.square().sum() for mean in fused(backend, x, a, "softmax"))
    first, second = (torch.autograd.grad(total, [*x, *a], retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    gradient = torch.autograd.grad(total, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@on_all_kernels
def test_empty(backend, device):
    x = [level.requires_grad_() for level in pyramid([(0, 4, 3, 5), (0, 2, 1, 1)], torch.float16, device=device)]
    a = [torch.zeros(0, *level.shape[2:], device=device).requires_grad_() for level in x]
    means = fused(backend, x, a, "softmax")
    gradients = torch.autograd.grad(pack(means).sum(), [*x, *a])
    assert fused(backend, [], [], "mean") == [] and [mean.shape for mean in means] == [(0, 4), (0, 2)]
    assert [(g.shape, g.dtype) for g in gradients] == [(level.shape, level.dtype) for level in (*x, *a)]


@on_all_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_keep_to_their_schema(layout, backend, device):
    x = pyramid(SHAPES[1:], torch.float16, layout, device=device)
    x.append(x[0][:, 1:, 2:])
    weights = pack(maps_of(x))
    sizes = (2, [level.shape[2] * level.shape[3] for level in x], True)
    done = torch.library.opcheck(torch.ops.kdkernels.spatial_pool.default, (backend, x, weights), test_utils=CHECKS)
    done |= torch.library.opcheck(torch.ops.kdkernels.pool_weights.default, (backend, weights, *sizes), test_utils=CHECKS)
    three = (backend, weights, weights, weights)
    done |= torch.library.opcheck(torch.ops.kdkernels.pool_weights_backward.default, (*three, *sizes), test_utils=CHECKS)
    assert done == dict.fromkeys(CHECKS, "SUCCESS")


@on_all_kernels
def test_the_library_s_choice_of_a_backend(backend, device, monkeypatch):
    x = pyramid(SHAPES[1:], device=device)
    a = maps_of(x)
    monkeypatch.setattr(backends, "_choice", backend)
    got = functional.spatial_pool(dict(enumerate(x)), a)
    assert all(torch.equal(*pair) for pair in zip(got, fused(backend, x, a, "mean"), strict=True))
