"""Launch parameters: a table by compute capability, kernel, type, layout and size, and each kernel's own heuristic behind it.

The tables are those of `kdkernels.tables`, tables/sm_90.json for compute capability 9.0, by the dtype of a launch's first level, its layout
and the elements of its levels. Without a table, on anything that is no CUDA GPU, and where the table has no entry or one that says that the
heuristic was best, the heuristic decides.

They are written by `kdkernels bench tune` from times measured on such a GPU; an entry is

    "reduce bf16 contiguous large": {"parameters": {"BLOCK_INNER": 256, ..., "num_warps": 8}, ...}

Its "parameters" are null where no candidate was faster than the heuristic, else all those of the heuristic, with num_warps and num_stages
besides if they are wanted. Its other fields say what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import tables
from ..tables import DTYPES, LAYOUTS, SIZES, Key, capability, size_of

__all__ = ["SCHEMA", "SIZES", "TABLE", "TABLES", "Heuristic", "Key", "capability", "override", "parameters", "path", "read", "size_of"]

#: (type of the first pyramid, channels_last) -> constexpr block sizes and num_warps by their argument names. What a launch has to adapt to
#: its shapes besides, such as blocks wider than a level, it adapts in whatever `parameters` gives: a table knows no shapes.
Heuristic = Callable[[torch.dtype, bool], dict[str, int]]

TABLES = Path(__file__).with_name("tables")
SCHEMA = 1
#: Parameters that Triton has of every kernel.
OPTIONS = ("num_warps", "num_stages")
#: What a table says of each key; None: the heuristic was best.
Entries = Mapping[Key, Mapping[str, int] | None]
#: Kernel and capability -> its entries, once they were held against the heuristic.
_CHECKED: dict[tuple[str, tuple[int, int]], Entries] = {}
#: Kernel -> changes and the latest parameters of the override that is in force.
_OVERRIDES: dict[str, tuple[Mapping[str, int], dict[str, int]]] = {}


def parameters(kernel: str, heuristic: Heuristic, levels: Sequence[Tensor], last: bool) -> dict[str, int]:
    """Keyword arguments of the launch of `kernel` over `levels`: the table's, or the heuristic's where the table has none.

    The GPU is not waited for, and a second call of the same kind reads no file. Raises ValueError, with the file and the key, for a table
    that is malformed or whose parameters are not those of the heuristic.
    """
    x = levels[0]
    if kernel in _OVERRIDES:
        changes, used = _OVERRIDES[kernel]
        usual = heuristic(x.dtype, last)
        if unknown := set(changes) - {*usual, *OPTIONS}:
            raise ValueError(f"{kernel} has no parameters {', '.join(sorted(unknown))}; it has {', '.join({**usual, **changes})}")
        used.clear()
        used.update({**usual, **changes})
        return dict(used)
    here = capability(x.device.index) if x.is_cuda else None
    entries = _entries(kernel, heuristic, here) if here is not None and x.dtype in DTYPES else None
    if not entries:
        return heuristic(x.dtype, last)
    return dict(entries.get(Key(kernel, DTYPES[x.dtype], LAYOUTS[last], size_of(levels))) or heuristic(x.dtype, last))


@contextmanager
def override(kernel: str, changes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Within it launches of `kernel`, whatever tables say, take its heuristic's parameters with these changes. For tuning.

    Yields a dict that holds the parameters of the latest launch. It counts for all threads, and those within it are not to be nested.
    """
    used: dict[str, int] = {}
    _OVERRIDES[kernel] = changes, used
    try:
        yield used
    finally:
        del _OVERRIDES[kernel]


def path(capability: tuple[int, int]) -> Path:
    """Where the table of these GPUs is looked for."""
    return tables.path(TABLES, capability)


def read(file: Path) -> dict[str, Any]:
    """The table in this file, checked. Raises ValueError with the file, and the key where it is about one, for what is no table."""
    return TABLE.read(file)


def _problem(entry: Any) -> str:
    """What is wrong with an entry, "" for nothing."""
    if not isinstance(entry, dict) or "parameters" not in entry:
        return "expected an object with parameters"
    chosen = entry["parameters"]
    if chosen is None:
        return ""
    if not isinstance(chosen, dict) or not all(type(value) is int and value >= 1 for value in chosen.values()):
        return f"parameters must be null or whole numbers of 1 or more by name; got {chosen!r}"
    warps = chosen.get("num_warps", 1)
    return "" if warps in (1, 2, 4, 8, 16, 32) else f"num_warps must be a power of 2 up to 32; got {warps}"


TABLE = tables.Kind("launch parameters", SCHEMA, _problem)


def _entries(kernel: str, heuristic: Heuristic, here: tuple[int, int]) -> Entries:
    """The kernel's entries in the table of these GPUs. All are held against the heuristic: what is wrong shows in the first launch."""
    if (kernel, here) in _CHECKED:
        return _CHECKED[kernel, here]
    found = {key: chosen for key, chosen in _table(here).items() if key.name == kernel}
    for key, chosen in found.items():
        (dtype,) = (dtype for dtype, name in DTYPES.items() if name == key.dtype)
        usual = heuristic(dtype, key.layout == LAYOUTS[True])
        for what, names in (("unknown", set(chosen or usual) - {*usual, *OPTIONS}), ("missing", set(usual) - set(chosen or usual))):
            if names:
                raise ValueError(f"{path(here)}: {key}: {what} parameters {', '.join(sorted(names))}; {kernel} has {', '.join(usual)}")
    _CHECKED[kernel, here] = found
    return found


@cache
def _table(here: tuple[int, int]) -> Entries:
    return {key: entry["parameters"] for key, entry in TABLE.entries(path(here), here).items()}
