"""Tables of what was measured on GPUs: one JSON file for a compute capability, an entry for each name, type, layout and size.

What a table may say is looked up without guessing:

- The table is that of exactly this GPU's compute capability, sm_90.json for 9.0. Another chip's is never used.
- Its entry is that of exactly this kernel or primitive, this dtype, this layout, and the size that the call's tensors fall into
  (`size_of`): by the elements of all of them together, or, for `BY_IMAGE`, by the elements of one image and by the number of images.

A table is a JSON object:

    {"schema": 1, "capability": [9, 0], "runs": [provenance of a measurement, ...],
     "entries": {"reduce bf16 contiguous large": {..., "run": 0}, ...}}

An entry's "run" is the place in "runs" of the one that measured it. What else is in it is the table's own matter:
`kdkernels.triton.launch` and `kdkernels.choice`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
LAYOUTS = ("contiguous", "channels_last")
#: Size -> the elements at which the next one begins.
SIZES = {"small": 1 << 21, "medium": 1 << 25, "large": None}
#: Primitives that work on image after image, and read each twice: whether the second read finds it in a cache depends on the image's
#: elements, and how much of the work overlaps on the number of images.
BY_IMAGE = frozenset({"terms_persistent"})
#: Their sizes -> the elements of an image at which the next one begins, less than twice those that are measured; huge ones are not.
IMAGE_SIZES = {"small": 1 << 20, "medium": 6 << 20, "large": 24 << 20, "huge": None}
#: What is added to such a size -> the fewest images of which that holds, the most first. A single image has nothing to overlap with.
COUNTS = {"-x8": 8, "": 2, "-x1": 0}


class Key(NamedTuple):
    """What an entry is about, `name` being a kernel's or a primitive's; its text is the entry's name in the file."""

    name: str
    dtype: str
    layout: str
    size: str

    def __str__(self) -> str:
        return " ".join(self)


@dataclass(frozen=True)
class Kind:
    """What tables are about.

    what:    in words, for errors
    schema:  of their entries
    problem: what is wrong with an entry, "" for nothing
    known:   the names that a key can have; empty where any may be one
    """

    what: str
    schema: int
    problem: Callable[[Any], str]
    known: Collection[str] = ()

    def read(self, file: Path) -> dict[str, Any]:
        """The table in this file, checked. Raises ValueError with the file, and the key where it is about one, for what is no table."""
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: no JSON: {error}") from None
        if not isinstance(table, dict) or table.get("schema") != self.schema:
            raise ValueError(f"{file}: no table of {self.what} with schema {self.schema}")
        chip, entries = table.get("capability"), table.get("entries")
        if not isinstance(chip, list) or len(chip) != 2 or not all(type(part) is int for part in chip):
            raise ValueError(f"{file}: capability must be two whole numbers, as [9, 0]; got {chip!r}")
        if not isinstance(entries, dict) or not isinstance(table.get("runs"), list):
            raise ValueError(f"{file}: entries must be an object and runs a list")
        for name, entry in entries.items():
            if problem := _wrong_key(name, self.known) or self.problem(entry) or _wrong_run(entry, table["runs"]):
                raise ValueError(f"{file}: {name}: {problem}")
        return table

    def entries(self, file: Path, chip: tuple[int, int]) -> dict[Key, Any]:
        """Those of the table in this file, which must be of these GPUs; none where there is no file. Raises ValueError as `read`."""
        if not file.is_file():
            return {}
        table = self.read(file)
        if table["capability"] != list(chip):
            raise ValueError(f"{file}: this is a table of compute capability {'.'.join(map(str, table['capability']))}")
        return {Key(*name.split(" ")): entry for name, entry in table["entries"].items()}

    def empty(self, chip: tuple[int, int]) -> dict[str, Any]:
        """A table of these GPUs without entries."""
        return {"schema": self.schema, "capability": list(chip), "runs": [], "entries": {}}


def size_of(tensors: Sequence[Tensor], name: str = "") -> str:
    """Which of `sizes` a call of this kernel or primitive on these tensors, (N, ...) for `BY_IMAGE`, has."""
    elements = sum([x.numel() for x in tensors])
    if name not in BY_IMAGE:
        return _at(elements, SIZES)
    images = tensors[0].shape[0]
    return _at(elements // max(images, 1), IMAGE_SIZES) + next(count for count, least in COUNTS.items() if images >= least)


def sizes(name: str) -> list[str]:
    """All that a call of this kernel or primitive can have."""
    return [size + count for count in COUNTS for size in IMAGE_SIZES] if name in BY_IMAGE else list(SIZES)


def _at(elements: int, ends: Mapping[str, int | None]) -> str:
    return next(size for size, end in ends.items() if end is None or elements < end)


@cache
def capability(device: int) -> tuple[int, int] | None:
    """Compute capability of a CUDA GPU; None for a GPU of another make, whose numbers mean other chips."""
    return None if torch.version.cuda is None else torch.cuda.get_device_capability(device)


def path(folder: Path, chip: tuple[int, int]) -> Path:
    """Where in a folder the table of these GPUs is looked for."""
    return folder / f"{architecture(chip)}.json"


def architecture(chip: tuple[int, int]) -> str:
    """Of GPUs by their compute capability, as compilers have it: sm_90."""
    return f"sm_{chip[0]}{chip[1]}"


def _wrong_key(name: str, names: Collection[str]) -> str:
    """What is wrong with an entry's name, "" for nothing. names: as `Kind.known`"""
    words = name.split(" ")
    if len(words) != len(Key._fields):
        return f"expected a key of {', '.join(Key._fields)} with a space between them"
    key = Key(*words)
    kinds = {"dtype": DTYPES.values(), "layout": LAYOUTS, "size": sizes(key.name), **({"name": sorted(names)} if names else {})}
    for field, known in kinds.items():
        if getattr(key, field) not in known:
            return f"{field} must be one of {', '.join(known)}; got {getattr(key, field)!r}"
    return ""


def _wrong_run(entry: Any, runs: Sequence[Any]) -> str:
    """What is wrong with an entry's "run", "" for nothing."""
    run = entry.get("run")
    return "" if type(run) is int and 0 <= run < len(runs) else f"run must be a place in runs, of which there are {len(runs)}; got {run!r}"
