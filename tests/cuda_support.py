"""The tests of the native kernels with those for CUDA, in the emulator: no order of threads and blocks may change their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType

import native_support
import pytest
from emulation import emulated
from native_support import same_bits
from torch import Tensor

#: Orders of threads and blocks: as they are numbered, backwards, and two random ones.
ORDERS = (0, 1, 2, 3)


def in_any_order(run: Callable[[], Sequence[Tensor]], orders: Sequence[int] = ORDERS) -> list[Tensor]:
    """What `run` returns by the emulated kernels, on poisoned memory; the same bits in all of the orders."""
    results = []
    for seed in orders:
        with emulated(seed):
            results.append(list(run()))
    first, *others = results
    for seed, other in zip(orders[1:], others, strict=True):
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True)), f"order {seed}: other bits than order {orders[0]}"
    return first


@contextmanager
def with_cuda_kernels(orders: Sequence[int] = (ORDERS[0], ORDERS[-1])) -> Iterator[ModuleType]:
    """Within it the backend "native" runs the emulated kernels, `native_support.same_everywhere` in these orders. Gives the emulator."""
    with emulated() as emulator, pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_support, "same_everywhere", partial(in_any_order, orders=orders))
        yield emulator


#: With which kernels a test of the native backend runs: those for the CPU, and those for CUDA.
MACHINES = [pytest.param(nullcontext, id="cpu"), pytest.param(with_cuda_kernels, id="cuda", marks=pytest.mark.emulated)]
