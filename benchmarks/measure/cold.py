"""Compilers without memory: what a first call costs when nothing was ever compiled here."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from tempfile import TemporaryDirectory

import torch


@contextmanager
def cold_caches(device: torch.device) -> Iterator[None]:
    """Within it torch.compile and Triton find nothing that was compiled before: no file, and nothing of kdkernels' kernels in memory.

    The compiler itself is loaded before (seconds, once a process), so that a time taken within does not depend on what came first.
    """
    _load_compiler(device)
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    _forget_kernels()
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        warnings.catch_warnings(),
        inductor.patch(force_disable_caches=True),
        fresh_cache(dir=folder, delete=False),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


@cache
def _load_compiler(device: torch.device) -> None:
    torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))


def _forget_kernels() -> None:
    """Triton keeps what it compiled in the decorated functions."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kdkernels.triton"):
            for value in vars(module).values():
                compiled = getattr(value, "device_caches", None)
                if compiled is not None:
                    compiled.clear()
