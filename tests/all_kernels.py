"""What the tests share that all backends with fused kernels pass, Triton's and the native one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import fused_support
import gpu_support
import native_support
import pytest
import torch
import triton
import triton_support
from fused_support import Losses

from benchmarks.providers import providers

_ON_GPU = (pytest.mark.gpu, *gpu_support.needs_cuda_library)
_EMULATED = (pytest.mark.emulated, native_support.needs_library)
#: Backends with kernels for GPUs, and devices that they run on.
GPU_KERNELS = [
    *([("triton", "cpu")] if triton.knobs.runtime.interpret else []),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("native", "cuda", marks=_ON_GPU),
]
#: Those, the native kernels for the CPU, and those for GPUs as a CPU emulates them: see `conftest.emulator`.
KERNELS = [
    *GPU_KERNELS,
    pytest.param("native", "cpu", marks=native_support.needs_library),
    pytest.param("native", "cpu", marks=_EMULATED, id="native-emulated"),
]
on_all_kernels = pytest.mark.parametrize(("backend", "device"), KERNELS)
#: For what the native kernels' own tests say of the CPU.
on_gpu_kernels = pytest.mark.parametrize(("backend", "device"), GPU_KERNELS)

#: The native backend with `terms_persistent`, which no table chooses yet: for an explicit call of GKD and BMFI.
ONE_LAUNCH = "native, one launch"
in_one_launch = pytest.param(ONE_LAUNCH, marks=gpu_support.needs_cuda_library)
#: The ways of a GPU to compute GKD and BMFI: by the passes of each backend, and in one launch.
WAYS = [*gpu_support.BACKENDS, in_one_launch]
#: Where the one launch runs.
on_one_launch = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=_EMULATED, id="emulated"), pytest.param("cuda", marks=_ON_GPU)]
)


@contextmanager
def chosen(way: str) -> Iterator[None]:
    """Within it calls are computed so: by a backend, or by the one launch, of which some call has to have made use."""
    if way != ONE_LAUNCH:
        # As the benchmarks choose it, whose oracle puts back what was chosen so.
        with providers()[way].active():
            yield
        return
    # `kdkernels.ops.terms_persistent` is the function of that name.
    module = importlib.import_module("kdkernels.ops.terms_persistent")
    one_launch = replace(providers()["native"], primitive="terms_persistent")
    with one_launch.active(), patch.object(module, "fused", wraps=module.fused) as launched:
        yield
    assert launched.called, "no call was made in one launch: all went by passes"


def poisoned(backend: str) -> AbstractContextManager[None]:
    """Within it what the backend's kernels do not write is NaN."""
    return native_support.poisoned() if backend == "native" else triton_support.poisoned()


def rounding(backend: str, device: str, dtype: torch.dtype) -> float:
    """Relative error of one rounding to the type where this backend's kernels run; Triton's interpreter truncates to bf16."""
    interpreted = backend == "triton" and device == "cpu"
    return triton_support.ROUNDING[dtype] if interpreted or dtype != torch.bfloat16 else 2**-8


def check(losses: Losses, case: dict[str, Any], backend: str) -> float:
    """The largest error against the reference, in units of what is allowed."""
    return fused_support.check(losses, case, backend, lambda: poisoned(backend))
