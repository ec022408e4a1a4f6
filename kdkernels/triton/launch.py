"""Launch parameters: a table by compute capability, kernel, type, layout and size, and each kernel's own heuristic behind it.

What the tables may say is looked up without guessing:

- The table is that of exactly this GPU's compute capability, tables/sm_90.json for 9.0. Another chip's is never used; without one, and on
  anything that is no CUDA GPU, the heuristic decides.
- Its entry is that of this kernel, this dtype of the first level, this layout, and the size that the elements of the launch's levels fall
  into (`size_of`). Where it has none, or one that says that the heuristic was best, the heuristic decides.

A table is a JSON object, written by `kdkernels bench tune` from times measured on such a GPU:

    {"schema": 1, "capability": [9, 0], "runs": [provenance of a measurement, ...],
     "entries": {"reduce bf16 contiguous large": {"parameters": {"BLOCK_INNER": 256, ..., "num_warps": 8}, ...}, ...}}

An entry's "parameters" are null where no candidate was faster than the heuristic, else all those of the heuristic, with num_warps and
num_stages besides if they are wanted. "run" is its place in "runs"; its other fields say what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: (type of the first pyramid, channels_last) -> constexpr block sizes and num_warps by their argument names. What a launch has to adapt to
#: its shapes besides, such as blocks wider than a level, it adapts in whatever `parameters` gives: a table knows no shapes.
Heuristic = Callable[[torch.dtype, bool], dict[str, int]]

TABLES = Path(__file__).with_name("tables")
SCHEMA = 1
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
LAYOUTS = ("contiguous", "channels_last")
#: Size -> the elements at which the next one begins.
SIZES = {"small": 1 << 21, "medium": 1 << 25, "large": None}
#: Parameters that Triton has of every kernel.
OPTIONS = ("num_warps", "num_stages")


class Key(NamedTuple):
    """What an entry of a table is about; its text is the entry's name in the file."""

    kernel: str
    dtype: str
    layout: str
    size: str

    def __str__(self) -> str:
        return " ".join(self)


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


def size_of(levels: Sequence[Tensor]) -> str:
    """Small, medium or large, by the elements of all levels."""
    elements = sum(x.numel() for x in levels)
    return next(size for size, end in SIZES.items() if end is None or elements < end)


@cache
def capability(device: int) -> tuple[int, int] | None:
    """Compute capability of a CUDA GPU; None for a GPU of another make, whose numbers mean other chips."""
    return None if torch.version.cuda is None else torch.cuda.get_device_capability(device)


def path(capability: tuple[int, int]) -> Path:
    """Where the table of these GPUs is looked for."""
    return TABLES / f"sm_{capability[0]}{capability[1]}.json"


def read(file: Path) -> dict[str, Any]:
    """The table in this file, checked. Raises ValueError with the file, and the key where it is about one, for what is no table."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON: {error}") from None
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise ValueError(f"{file}: no table of launch parameters with schema {SCHEMA}")
    chip, entries = table.get("capability"), table.get("entries")
    if not isinstance(chip, list) or len(chip) != 2 or not all(type(part) is int for part in chip):
        raise ValueError(f"{file}: capability must be two whole numbers, as [9, 0]; got {chip!r}")
    if not isinstance(entries, dict) or not isinstance(table.get("runs"), list):
        raise ValueError(f"{file}: entries must be an object and runs a list")
    for name, entry in entries.items():
        if problem := _problem(name, entry):
            raise ValueError(f"{file}: {name}: {problem}")
    return table


def _problem(name: str, entry: Any) -> str:
    """What is wrong with an entry, "" for nothing."""
    words = name.split(" ")
    if len(words) != len(Key._fields):
        return f"expected a key of {', '.join(Key._fields)} with a space between them"
    key = Key(*words)
    for field, known in (("dtype", tuple(DTYPES.values())), ("layout", LAYOUTS), ("size", tuple(SIZES))):
        if getattr(key, field) not in known:
            return f"{field} must be one of {', '.join(known)}; got {getattr(key, field)!r}"
    if not isinstance(entry, dict) or "parameters" not in entry:
        return "expected an object with parameters"
    chosen = entry["parameters"]
    if chosen is None:
        return ""
    if not isinstance(chosen, dict) or not all(type(value) is int and value >= 1 for value in chosen.values()):
        return f"parameters must be null or whole numbers of 1 or more by name; got {chosen!r}"
    warps = chosen.get("num_warps", 1)
    return "" if warps in (1, 2, 4, 8, 16, 32) else f"num_warps must be a power of 2 up to 32; got {warps}"


def _entries(kernel: str, heuristic: Heuristic, here: tuple[int, int]) -> Entries:
    """The kernel's entries in the table of these GPUs. All are held against the heuristic: what is wrong shows in the first launch."""
    if (kernel, here) in _CHECKED:
        return _CHECKED[kernel, here]
    found = {key: chosen for key, chosen in _table(here).items() if key.kernel == kernel}
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
    file = path(here)
    if not file.is_file():
        return {}
    table = read(file)
    if table["capability"] != list(here):
        raise ValueError(f"{file}: this is a table of compute capability {'.'.join(map(str, table['capability']))}")
    return {Key(*name.split(" ")): entry["parameters"] for name, entry in table["entries"].items()}
