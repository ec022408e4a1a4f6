"""What the tests share that all backends with fused kernels pass, Triton's and the native one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import fused_support
import gpu_support
import native_support
import pytest
import triton
import triton_support
from fused_support import Losses

#: Backends with kernels for GPUs, and devices that they run on.
GPU_KERNELS = [
    *([("triton", "cpu")] if triton.knobs.runtime.interpret else []),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("native", "cuda", marks=(pytest.mark.gpu, *gpu_support.needs_cuda_library)),
]
#: Those, the native kernels for the CPU, and those for GPUs as a CPU emulates them: see `conftest.emulator`.
KERNELS = [
    *GPU_KERNELS,
    pytest.param("native", "cpu", marks=native_support.needs_library),
    pytest.param("native", "cpu", marks=(pytest.mark.emulated, native_support.needs_library), id="native-emulated"),
]
on_all_kernels = pytest.mark.parametrize(("backend", "device"), KERNELS)
#: For what the native kernels' own tests say of the CPU.
on_gpu_kernels = pytest.mark.parametrize(("backend", "device"), GPU_KERNELS)


def poisoned(backend: str) -> AbstractContextManager[None]:
    """Within it what the backend's kernels do not write is NaN."""
    return native_support.poisoned() if backend == "native" else triton_support.poisoned()


def check(losses: Losses, case: dict[str, Any], backend: str) -> float:
    """The largest error against the reference, in units of what is allowed."""
    return fused_support.check(losses, case, backend, lambda: poisoned(backend))
