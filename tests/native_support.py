"""What the tests of the native backend share: whether it is there, and results that depend on no machine and hide nothing unwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from toolchain import needs_compiler
from torch import Tensor

from kdkernels import native

#: Where a compiler is there the library has to be: then its tests fail without it.
needs_library = needs_compiler
#: Relative error of gradients of the type, against float64.
GRADIENT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
#: Relative error of fp32 values, against float64.
VALUE = 2e-5


@contextmanager
def capability(name: str) -> Iterator[None]:
    """Within it the kernels use these instructions. Raises RuntimeError where the machine has not got them."""
    before = native.capability()
    torch.ops.kdkernels_native.set_cpu_capability(name)
    try:
        yield
    finally:
        torch.ops.kdkernels_native.set_cpu_capability(before)


def capabilities() -> list[str]:
    """The instructions that this machine has, of those that there are kernels for."""
    found = []
    for name in ("scalar", "avx2", "avx512"):
        try:
            with capability(name):
                found.append(name)
        except RuntimeError:
            continue
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch works with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it new uninitialised tensors, the library's too, are full of NaN, so that an element which no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether they are of one type and shape and equal, NaN to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_everywhere(run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """What `run` returns; the same bits with all instructions that this machine has and with one thread and two."""
    results = []
    with poisoned():
        for name in capabilities():
            for count in (1, 2):
                with capability(name), threads(count):
                    results.append((f"{name}, {count} threads", list(run())))
    (_, first), *others = results
    for where, other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True)), f"{where}: other bits than {results[0][0]}"
    return first
