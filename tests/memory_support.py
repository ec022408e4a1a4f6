"""What calls hold in memory, as the benchmarks measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.measure.memory import peak_bytes


def held_beside(call: Callable[[], Sequence[Tensor] | None]) -> int:
    """The most bytes that a call holds at a time besides its results."""
    results = sum(x.nbytes for x in call() or ())
    peak = peak_bytes(torch.device("cpu"), call)
    assert peak is not None, "the profiler sees allocations on a CPU"
    return peak - results
