"""What is in a cubin: registers and local memory, and the machine instructions, told by the tools inside Triton's wheel."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from triton import knobs

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_NAME = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
#: Arithmetic in fp64, conversions from and to it, and its reciprocals.
_FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|\w+\..*\bF64\b|MUFU\.\w*64H")


@dataclass(frozen=True)
class Binary:
    """registers: a thread's;   local: bytes of local memory a thread, which are spills where a kernel declares no arrays

    fp64, atomics: instructions;   loads, stores: bytes -> instructions on global memory, all bodies of the kernel
    """

    registers: int
    local: int
    fp64: int
    atomics: int
    loads: dict[int, int]
    stores: dict[int, int]


@cache
def inspect(cubin: bytes) -> Binary:
    """Needs no GPU and no CUDA toolkit."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _USAGE.search(_cuobjdump(["--dump-resource-usage", str(file)]))
        names = Counter(_NAME.findall(_cuobjdump(["-sass", str(file)])))
    assert usage is not None and names, "cuobjdump's answer is not understood"
    spilled = sum(count for name, count in names.items() if name.split(".")[0] in ("LDL", "STL"))
    return Binary(
        registers=int(usage[1]),
        # A stack that nobody touches would not be slow; one that is touched shows up in both.
        local=max(int(usage[2]), int(usage[3]), 4 * bool(spilled)),
        fp64=sum(count for name, count in names.items() if _FP64.match(name)),
        atomics=sum(count for name, count in names.items() if name.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG", "UREDGR")),
        loads=_widths(names, ("LDG", "LDGSTS")),
        stores=_widths(names, ("STG",)),
    )


def _widths(names: Counter[str], kinds: Sequence[str]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for name, count in names.items():
        kind, *modifiers = name.split(".")
        if kind in kinds:
            found[next((_BYTES[modifier] for modifier in modifiers if modifier in _BYTES), 4)] += count
    return dict(sorted(found.items()))


_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _cuobjdump(options: Sequence[str]) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, *options], capture_output=True, text=True, check=True).stdout
