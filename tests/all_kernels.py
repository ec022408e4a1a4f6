"""What the tests share that all backends with fused kernels pass, Triton's and the native one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import fused_support
import native_support
import pytest
import triton
import triton_support
from fused_support import Losses

#: Backends, and devices that they run on.
KERNELS = [
    *([("triton", "cpu")] if triton.knobs.runtime.interpret else []),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("native", "cpu", marks=native_support.needs_library),
]
on_all_kernels = pytest.mark.parametrize(("backend", "device"), KERNELS)


def poisoned(backend: str) -> AbstractContextManager[None]:
    """Within it what the backend's kernels do not write is NaN."""
    return native_support.poisoned() if backend == "native" else triton_support.poisoned()


def check(losses: Losses, case: dict[str, Any], backend: str) -> float:
    """The largest error against the reference, in units of what is allowed."""
    return fused_support.check(losses, case, backend, lambda: poisoned(backend))
