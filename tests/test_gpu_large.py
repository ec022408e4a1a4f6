"""A level of more than 2^31 elements on a GPU. It takes most of the memory: the GPU suite runs nothing beside it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import all_kernels
import pytest
import torch
from gpu_support import DEVICE, Losses, explicit, mapped, moved
from torch import Tensor

from benchmarks.registry import LAYOUTS
from kdkernels import BMFILoss, GKDLoss, set_backend

pytestmark = pytest.mark.gpu
#: More than 2^31 elements, the last of them in the last image.
SHAPE = (9, 256, 1000, 1000)
BYTES = 80e9


@pytest.fixture(autouse=True, params=all_kernels.WAYS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < BYTES:
        pytest.skip(f"needs {BYTES / 1e9:.0f} GB of free GPU memory")
    with all_kernels.chosen(request.param):
        yield request.param


def large(layout: str) -> dict[str, Any]:
    """A pyramid of one level, all of it random, and boxes that cover a good part of it."""
    memory_format, generator = LAYOUTS[layout], torch.Generator(DEVICE).manual_seed(0)

    def level(std: float) -> list[Tensor]:
        x = torch.empty(SHAPE, dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format)
        return [x.normal_(0.0, std, generator=generator)]

    corners = torch.tensor([[500.0, 700.0, 5000.0, 6000.0], [6000.0, 100.0, 7900.0, 7990.0]], device=DEVICE)
    counts = torch.full(SHAPE[:1], 2, dtype=torch.int32, device=DEVICE)
    return {
        "student_features": level(1.0),
        "teacher_features": level(1.0),
        "student_gradients": level(0.01),
        "teacher_gradients": level(0.01),
        "boxes": (corners.expand(SHAPE[0], 2, 4).contiguous(), counts),
        "image_size": (8000, 8000),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout: str, backend: str) -> None:
    """The last image, which begins before element 2^31 and ends behind it, against itself alone in float64.

    Losses without extrema, except in one launch, which takes no others, and with few signs: among a million cells some lie where fp32 and
    float64 rightly differ about these.
    """
    normalize = "minmax" if backend == all_kernels.ONE_LAUNCH else "zscore"
    losses: Losses = {
        "gkd": GKDLoss(normalize=normalize, distance="mse", rectify="none", average="n", reduction="none"),
        "bmfi": BMFILoss(alpha=0.1, gamma=10.0, area_norm=False, reduction="none"),
    }
    given, images = large(layout), SHAPE[0]
    upstream = torch.ones(1, images, device=DEVICE)
    *values, gradient = explicit(losses, given, upstream)
    assert gradient.numel() > 2**31 and gradient.is_contiguous(memory_format=LAYOUTS[layout])
    last, results = mapped(given, lambda x: x[-1:]), [*(value[:, -1:] for value in values), gradient[-1:]]
    set_backend("reference")
    wanted = explicit(losses, moved(last, DEVICE, torch.float64), upstream[:, :1].double())
    for got, want in zip(results, wanted, strict=True):
        # Every loss is divided by the number of images.
        error = float((got.double() * images - want).norm() / want.norm())
        assert error < (2e-5 if got.dim() == 2 else 4e-3)
