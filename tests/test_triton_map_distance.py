"""The parts of `map_distance` that other Triton kernels call, each for one map, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_support import DEVICES, poisoned, pyramid, relative_error

from kdkernels.reference.map_distance import map_distance as reference
from kdkernels.triton.map_distance import map_forward, map_gradient


@triton.jit
def forward_of_one_map(
    source, target, state, value, pixels, eps, temperature, RECTIFY: tl.constexpr, NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr
):
    result = map_forward(
        source, target, None, state, pixels, pixels.to(tl.float32), eps, temperature, RECTIFY, NORMALIZE, NORMALIZE, DISTANCE, True, 64
    )
    tl.store(value, result)


@triton.jit
def gradient_of_one_map(
    source, target, state, grad, result, pixels, temperature, RECTIFY: tl.constexpr, NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr
):
    p = tl.arange(0, 256)
    gradient = map_gradient(
        source,
        target,
        None,
        state,
        tl.load(grad),
        p,
        p < pixels,
        pixels.to(tl.float32),
        temperature,
        RECTIFY,
        NORMALIZE,
        NORMALIZE,
        DISTANCE,
    )
    tl.store(result + p, gradient, p < pixels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rectify", ["none", "abs", "relu"])
@pytest.mark.parametrize("normalize", ["minmax", "zscore", "softmax", "none"])
def test_the_student_may_be_rectified_when_it_is_read(device, normalize, rectify):
    """As other kernels call the functions. A rectified map has many equal minima where relu stops, all without a gradient of their own."""
    (raw,), (target,) = pyramid([(1, 11, 13)], seed=1, device=device), pyramid([(1, 11, 13)], seed=2, device=device)
    grad, eps, temperature, pixels = torch.tensor([-3.0], device=device), 0.02, 0.5, raw.numel()
    for distance in ("l1", "mse", "smooth_l1"):
        with poisoned():
            state, value, result = (torch.empty(size, device=device) for size in (8, 1, pixels))
        forward_of_one_map[(1,)](raw, target, state, value, pixels, eps, temperature, rectify, normalize, distance)
        gradient_of_one_map[(1,)](raw, target, state, grad, result, pixels, temperature, rectify, normalize, distance)
        student = raw.double().cpu().requires_grad_()
        act = {"none": lambda x: x, "abs": torch.abs, "relu": torch.relu}[rectify]
        want = reference([act(student)], [target.double().cpu()], normalize, distance, eps, "relative", temperature)
        (want_gradient,) = torch.autograd.grad(-3 * want.sum(), student)
        assert relative_error(value, want.detach()[0]) < 1e-5
        assert relative_error(result.view_as(raw), want_gradient) < 1e-4
