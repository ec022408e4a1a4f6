"""Which backend `auto` takes for tensors on a GPU: for every kind of call the one that took the least time, where that was measured.

The tables are those of `kdkernels.tables`, choices/sm_90.json for compute capability 9.0, by primitive, by the dtype and layout of the
first of the tensors that decide about a call, and by their size (`tables.size_of`). `kdkernels bench choose` writes them; an entry is

    "terms bf16 contiguous large": {"ms": {"triton": 0.61, "native": 0.58}, ...}

Its "ms" are the milliseconds that the same calls took with each backend. The smaller decides; where they are equal, and where a table has
no entry, the first of `BACKENDS`. Its other fields say what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import tables
from .tables import DTYPES, LAYOUTS, Key, size_of

TABLES = Path(__file__).with_name("choices")
SCHEMA = 1
#: Those with kernels for a GPU, in the order in which `auto` tries them where nothing was measured.
BACKENDS = ("triton", "native")
#: What a table can be about. `kdkernels.backend` adds them as they are registered.
PRIMITIVES: set[str] = set()

F = TypeVar("F", bound=Callable[..., Any])
#: What a table says of each key: milliseconds of all backends, the fastest first.
Times = Mapping[Key, Mapping[str, float]]


def constant(function: F) -> F:
    """For torch.compile: it calls `function` while it traces and takes the result, of plain values, for a constant.

    It is torch.compiler.assume_constant_result without the import of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def order(primitive: str, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """The backends in the order in which `auto` tries them for a call that these tensors, on a CUDA GPU, decide about.

    The GPU is not waited for, and only a first call reads a file. Raises ValueError, with the file and the key, for a malformed table.
    """
    x = tensors[0]
    # Without a table sizes are not asked for, so that torch.compile need not tell them apart.
    if x.dtype not in DTYPES or not measured(x.device.index):
        return BACKENDS
    return ranked(x.device.index, *key_of(primitive, tensors))


def key_of(primitive: str, tensors: Sequence[Tensor]) -> Key:
    """What the entry that decides is about. The type of the first tensor is one of `DTYPES`."""
    x = tensors[0]
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return Key(primitive, DTYPES[x.dtype], LAYOUTS[int(last)], size_of(tensors, primitive))


@constant
def measured(device: int) -> bool:
    """Whether there is a table of this GPU with anything in it."""
    return bool(_orders(device))


@constant
def ranked(device: int, *key: str) -> tuple[str, ...]:
    """All backends, the fastest by this GPU's table first."""
    return _orders(device).get(key, BACKENDS)


def why(primitive: str, device: int, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Backend -> for which calls of this primitive on this GPU `auto` takes it, and why; {} where nothing was measured of it.

    names: what the backends are to be called, where not by their names
    """
    called = {name: name for name in BACKENDS} | dict(names or {})
    chip = tables.capability(device)
    found = {} if chip is None else {key: ms for key, ms in times(chip).items() if key.name == primitive}
    if chip is None or not found:
        return {}
    said: dict[str, list[str]] = {}
    for name in BACKENDS:
        won = {key: ms for key, ms in found.items() if next(iter(ms)) == name}
        if won:
            # The one that it matters most for.
            key = max(won, key=lambda key: max(won[key].values()) - won[key][name])
            others = f", and {len(won) - 1} more of {len(found)} measured kinds of calls" if len(won) > 1 else ""
            said[name] = [f"{_compared(won[key], called)} ({', '.join((tables.architecture(chip), *key[1:]))}{others})"]
    if not {tuple(key[1:]) for key in found}.issuperset(product(DTYPES.values(), LAYOUTS, tables.sizes(primitive))):
        said.setdefault(BACKENDS[0], []).append("all other kinds of calls, which were not measured")
    return {name: "; ".join(parts) for name, parts in said.items()}


def unmeasured(device: int) -> str:
    """Why `auto` takes the first of `BACKENDS` where `why` has nothing to say."""
    chip = tables.capability(device)
    gpu = "its compute capability is unknown" if chip is None else tables.architecture(chip)
    return f"no measurement for this GPU ({gpu}): {BACKENDS[0].capitalize()}"


def path(chip: tuple[int, int]) -> Path:
    """Where the table of these GPUs is looked for."""
    return tables.path(TABLES, chip)


@cache
def times(chip: tuple[int, int]) -> Times:
    """What the table of these GPUs says. Raises ValueError, with the file and the key, for a malformed one."""
    entries = TABLE.entries(path(chip), chip)
    # Sorting leaves equals in the order of BACKENDS.
    return {key: {name: entry["ms"][name] for name in sorted(BACKENDS, key=entry["ms"].__getitem__)} for key, entry in entries.items()}


def forget() -> None:
    """Tables are read again: for who has written one."""
    times.cache_clear()
    _orders.cache_clear()


@cache
def _orders(device: int) -> Mapping[tuple[str, ...], tuple[str, ...]]:
    chip = tables.capability(device)
    return {} if chip is None else {key: tuple(ms) for key, ms in times(chip).items()}


def _compared(ms: Mapping[str, float], called: Mapping[str, str]) -> str:
    """What was measured of the fastest, against the others, which are called so."""
    (_, least), *others = ms.items()
    verdict = "faster" if least < others[0][1] else "as fast"
    return f"measured {verdict}: {least:.4g} ms against {' and '.join(f'{value:.4g} ms of {called[name]}' for name, value in others)}"


def _problem(entry: Any) -> str:
    """What is wrong with an entry, "" for nothing."""
    ms = entry.get("ms") if isinstance(entry, dict) else None
    if not isinstance(ms, dict) or set(ms) != set(BACKENDS):
        return f"expected an object with ms of {' and '.join(BACKENDS)}"
    if not all(type(value) in (int, float) and isfinite(value) and value > 0 for value in ms.values()):
        return f"ms must be numbers above 0; got {ms!r}"
    return ""


TABLE = tables.Kind("times of backends", SCHEMA, _problem, PRIMITIVES)
