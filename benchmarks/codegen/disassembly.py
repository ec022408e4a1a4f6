"""What is in a cubin: registers and local memory, and the machine instructions, told by cuobjdump; Triton's wheel has it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")
_NAME = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
#: Arithmetic in fp64, conversions from and to it, and its reciprocals.
_FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|\w+\..*\bF64\b|MUFU\.\w*64H")
#: On memory of any kind, and by the bulk copy engine.
_ATOMIC = re.compile(r"(U?(ATOM|RED)(G|S|AS|GR)?|U(BLK|TMA)REDG?)(\.|$)")
_COUNTING = re.compile(r"\w+\.(?:\w+\.)*(ADD|INC|DEC)\b(?!.*\bB?F(16|32|64))")
#: Copies of whole blocks of memory, which one thread starts and the copy engine makes.
_BULK = re.compile(r"U(BLKCP|TMALDG|TMASTG)\b")


@dataclass(frozen=True)
class Instructions:
    """Numbers of instructions, in all bodies of a kernel.

    fp64:     arithmetic and conversions;   bulk: copies by the copy engine
    atomics:  on memory of any kind;   counters: those of them that add to a whole number
    local_loads, local_stores: of local memory, which spilled registers and indexed arrays lie in
    loads, stores: of global memory, and of memory of a kind that the compiler could not tell; bytes -> instructions
    """

    fp64: int
    atomics: int
    counters: int
    bulk: int
    local_loads: int
    local_stores: int
    loads: dict[int, int]
    stores: dict[int, int]


@dataclass(frozen=True)
class Binary:
    """registers: a thread's;   local: bytes of local memory a thread, which are spills where a kernel declares no arrays"""

    registers: int
    local: int
    instructions: Instructions


@cache
def inspect(cubin: bytes) -> Binary:
    """Of one of Triton's kernels. Needs no GPU and no CUDA toolkit."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = USAGE.search(cuobjdump(tool, ["--dump-resource-usage", str(file)]))
        found = counted(cuobjdump(tool, ["-sass", str(file)]))
    assert usage is not None and found is not None, "cuobjdump's answer is not understood"
    spilled = found.local_loads + found.local_stores
    # A stack that nobody touches would not be slow; one that is touched shows up in both.
    return Binary(int(usage["registers"]), max(int(usage["stack"]), int(usage["local"]), 4 * bool(spilled)), found)


def counted(sass: str) -> Instructions | None:
    """The instructions of a disassembled kernel; None where there are none."""
    names = Counter(_NAME.findall(sass))

    def number(pattern: re.Pattern[str], among: re.Pattern[str] | None = None) -> int:
        return sum(count for name, count in names.items() if pattern.match(name) and (among is None or among.match(name)))

    if not names:
        return None
    return Instructions(
        fp64=number(_FP64),
        atomics=number(_ATOMIC),
        counters=number(_COUNTING, _ATOMIC),
        bulk=number(_BULK),
        local_loads=sum(_widths(names, ("LDL",)).values()),
        local_stores=sum(_widths(names, ("STL",)).values()),
        loads=_widths(names, ("LDG", "LDGSTS", "LD")),
        stores=_widths(names, ("STG", "ST")),
    )


def _widths(names: Counter[str], kinds: Sequence[str]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for name, count in names.items():
        kind, *modifiers = name.split(".")
        if kind in kinds:
            found[next((_BYTES[modifier] for modifier in modifiers if modifier in _BYTES), 4)] += count
    return dict(sorted(found.items()))


_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def by_width(widths: dict[int, int]) -> dict[str, int]:
    """As JSON has it: text for keys."""
    return {str(width): count for width, count in sorted(widths.items())}


def cuobjdump(tool: str, options: Sequence[str]) -> str:
    """What the tool prints. Raises CalledProcessError where it fails."""
    return subprocess.run([tool, *options], capture_output=True, text=True, errors="replace", check=True).stdout
