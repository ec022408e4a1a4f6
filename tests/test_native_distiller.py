"""The Distiller on the native kernels, what is particular to the CPU: the backend that auto takes, channels_last, autocast, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distiller_support import TOLERANCE, Train, batch, distance, largest_error, step, total
from native_support import GRADIENT, capability, needs_library, same_bits, threads
from torch import Tensor

from kdkernels import Distiller, set_backend
from kdkernels.distiller import MODES

pytestmark = needs_library


@pytest.fixture(autouse=True)
def restore() -> Any:
    yield
    set_backend("auto")


def plain(distiller: Distiller) -> dict[str, Tensor]:
    found = distiller(*batch("cpu"))
    total(found).backward()
    return found


def channels_last(distiller: Distiller) -> dict[str, Tensor]:
    """The student's features and gradients are channels_last, the teacher's contiguous."""
    student: Any = distiller.student
    student.to(memory_format=torch.channels_last)
    features: list[Tensor] = []
    hook = student.backbone.register_forward_hook(lambda module, args, result: features.extend(result.values()))
    found = plain(distiller)
    hook.remove()
    assert any(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in features)
    return found


def in_half_precision(distiller: Distiller) -> dict[str, Tensor]:
    """The features, and the gradients that arrive at them, are bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        found = distiller(*batch("cpu"))
    total(found).backward()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_channels_last(mode: str) -> None:
    assert largest_error("native", "cpu", mode, channels_last) < TOLERANCE


def test_half_precision() -> None:
    """The reference rounds a bf16 gradient for each loss and their sum, the kernels once, so that many elements are neighbours."""
    assert largest_error("native", "cpu", "inline", in_half_precision) < 2 * GRADIENT[torch.bfloat16]


@pytest.mark.parametrize("train", [plain, channels_last])
def test_inline_is_explicit(train: Train) -> None:
    inline, explicit = (step("native", "cpu", mode, train) for mode in ("inline", "explicit"))
    assert distance(inline, explicit) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_auto_trains_with_the_kernels(mode: str) -> None:
    auto, native = (step(name, "cpu", mode, plain) for name in ("auto", "native"))
    assert len(auto.values) > 1 and all(same_bits(value, native.values[name]) for name, value in auto.values.items())
    assert all(same_bits(g, native.gradients[name]) for name, g in auto.gradients.items())


def test_the_same_bits_with_all_instructions() -> None:
    """Those of the detector itself are torch's and stay what they are."""
    with threads(1):
        first = step("native", "cpu", "inline", plain)
        with capability("scalar"):
            second = step("native", "cpu", "inline", plain)
    assert all(same_bits(g, second.gradients[name]) for name, g in first.gradients.items())
    assert all(same_bits(value, second.values[name]) for name, value in first.values.items())
