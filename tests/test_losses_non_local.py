"""Non-local blocks: the associative form is the quadratic one, and where it begins and ends."""

from __future__ import annotations

import pytest
import torch
from oracle import cases
from oracle.compare import RTOL64, assert_close
from torch import nn

from kdkernels.losses.non_local import NonLocal

SHAPES = [(2, 6, 8, 9), (1, 4, 1, 7), (3, 2, 5, 1), (2, 1, 1, 1), (1, 5, 17, 16)]


def _quadratic(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """y_i = sum_j (theta_i . phi_j) g_j / P with the matrix of all pairs."""
    affinity = torch.einsum("nci,ncj->nij", theta, phi) / phi.shape[2]
    return torch.einsum("nij,ncj->nci", affinity, g)


def _block(shape: tuple[int, ...], pool: int, inner: int = 3) -> NonLocal:
    torch.manual_seed(3)
    block = NonLocal(shape[1], inner, pool).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    return block


@pytest.mark.parametrize("pool", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_are_those_of_the_quadratic_form(shape, pool):
    block = _block(shape, pool)
    (x,) = cases.tensors(cases.pyramid(1, [shape]), requires_grad=True)
    up = torch.randn(shape, dtype=torch.float64)
    results = []
    for attend in (NonLocal.attend, _quadratic):
        block.attend = attend
        z = block(x)
        results.append([z, *torch.autograd.grad((z * up).sum(), [x, *block.parameters()])])
    # A convolution's bias in front of a BatchNorm has no gradient but rounding: the largest gradient is the scale of all.
    scale = max(g.abs().max().item() for g in results[1])
    assert scale > 0 and z.shape == shape
    for got, want in zip(*results, strict=True):
        assert_close(got, want, RTOL64, atol=RTOL64 * scale)


def test_it_starts_as_the_identity():
    (x,) = cases.tensors(cases.pyramid(2, [(2, 4, 5, 6)]), torch.float32)
    assert torch.equal(NonLocal(4, 2, 2)(x), x)


def test_windows_are_at_most_the_map_and_drop_what_is_left_over():
    block = _block((2, 4, 5, 7), 3)
    (x,) = cases.tensors(cases.pyramid(3, [(2, 4, 5, 7)]))
    assert [part.shape[2] for part in block.embed(x)] == [35, 2, 2]
    block.pool = 8
    assert [part.shape[2] for part in block.embed(x)] == [35, 1, 1]
    want = torch.amax(block.g(x), (2, 3))
    assert torch.equal(block.embed(x)[2][:, :, 0], want)


def test_a_single_value_is_its_own_mean():
    block = _block((1, 4, 1, 1), 2)
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    z = block(x)
    assert_close(z, x + block.norm.bias[:, None, None], RTOL64)
    # As for any number of equal images, which BatchNorm knows itself: all but the bias is the difference of a value and its mean.
    assert_close(block(x.expand(3, -1, -1, -1)), z.expand(3, -1, -1, -1), RTOL64)
    assert torch.isnan(block(x * torch.nan)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_sums_do_not_overflow(dtype):
    theta, phi, g = (torch.full((1, 4, 4096), 8.0, dtype=dtype) for _ in range(3))
    attended = NonLocal.attend(theta, phi, g)
    assert attended.dtype == dtype and attended.isfinite().all()
    assert_close(attended.double(), torch.full((1, 4, 4096), 4 * 8.0**3), 1e-2)


def test_no_images():
    block = _block((0, 4, 5, 6), 2)
    x = torch.zeros(0, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape
