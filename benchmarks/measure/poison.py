"""Memory that shows when it was not written, and time in which work on a wrong stream reads old values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_permuted.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
#: Cycles that a GPU is kept busy for: 30 ms or more, longer than the host needs to enqueue a call.
HOLD_CYCLES = 60_000_000


class Poison(TorchDispatchMode):
    """Within it `torch.empty` and its relatives give NaN (integers: their largest number), and writes to `guarded` are noted.

    written: names of the operators that wrote to the memory of a guarded tensor, by whatever view or alias
    Sees what goes through PyTorch's dispatcher; a kernel's own allocations and writes do not. `spoil` is for those.
    """

    def __init__(self, guarded: Sequence[Tensor]) -> None:
        super().__init__()
        self.written: list[str] = []
        self._guarded = {x.untyped_storage().data_ptr() for x in guarded if x.numel()}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Else torch.compile gives up a function that is called within, for good and in silence: it would be timed as eager."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self._note_writes(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        return poisoned(out) if func in _EMPTY else out

    def _note_writes(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not func._schema.is_mutable:
            return
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for x in pytree.tree_leaves(value):
                if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() in self._guarded:
                    self.written.append(str(func))


def poisoned(x: Tensor) -> Tensor:
    """x, filled with what no right result holds."""
    if x.is_floating_point() or x.is_complex():
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


def spoil(like: Sequence[Tensor]) -> None:
    """Leaves NaN in freed blocks of the sizes of `like`, two of each: the next ones who ask the allocator get them.

    A block that the allocator returns to the system (on a CPU: above 32 MB) comes back as zeros instead.
    """
    blocks = [poisoned(torch.empty_like(x)) for x in like for _ in range(2)]
    del blocks


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: the allocator keeps freed blocks apart by stream."""
    return torch.cuda.Stream(device)


@contextmanager
def other_stream(device: torch.device) -> Iterator[None]:
    """On CUDA a stream that is neither the default one nor anybody else's is the current one; elsewhere nothing."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_stream(device)):
        yield
    torch.cuda.synchronize(device)


def hold(device: torch.device) -> None:
    """On CUDA: what is enqueued on the current stream from here on runs after a while, so that work elsewhere runs before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda._sleep(HOLD_CYCLES)
