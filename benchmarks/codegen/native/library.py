"""The kernels inside a compiled library, told by cuobjdump: nothing is compiled again, and no GPU is needed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import NamedTuple

from ..disassembly import USAGE, Instructions, counted, cuobjdump
from .occupancy import SHARED_RESERVED

_CUBIN = "Fatbin elf code:\n"
_NAMED = re.compile(r"\.(sm_(\d+)[a-z]?)\.cubin")
_USED = re.compile(rf"Function (\S+):\s+{USAGE.pattern}")
_FUNCTION = re.compile(r"^\s*Function : (\S+)\n", re.MULTILINE)
#: What a cubin's ELF says of a kernel, and who made it.
_INFO = re.compile(r"^\.nv\.info\.(\S+)\n((?:(?:[ \t].*)?\n)*)", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s*\S+\s+Value:\s*((?:0x[0-9a-f]+ )+)")
_RELEASE = re.compile(r"Tool Name: ptxas\s+Tool Version: .*\bV(\d[\d.]*)")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one chip.

    capability: 80, 90, 100;   threads: the most of a block, by its launch bounds; 0 where it has none
    registers, stack, local: of a thread, bytes of the last two;   shared: bytes that it declares, a block
    """

    symbol: str
    capability: int
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    instructions: Instructions


class Dump(NamedTuple):
    """What cuobjdump prints of the cubins of one chip: of its --dump-resource-usage, -elf and -sass."""

    usage: str
    elf: str
    sass: str


class NoTool(RuntimeError):
    """There is no cuobjdump."""


def dumps(file: Path) -> dict[int, Dump]:
    """By capability, of all cubins in a library. Raises NoTool, or CalledProcessError for what is no such library."""
    program = tool()
    chips = {int(number): name for name, number in _NAMED.findall(cuobjdump(program, ["--list-elf", str(file)]))}

    def printed(chip: str) -> Dump:
        return Dump(*(cuobjdump(program, ["-arch", chip, option, str(file)]) for option in ("--dump-resource-usage", "-elf", "-sass")))

    with ThreadPoolExecutor(len(chips) or 1) as pool:
        return dict(zip(chips, pool.map(printed, chips.values()), strict=True))


def kernels(capability: int, dump: Dump) -> Iterator[Kernel]:
    """One after the other; what several files of the library have is told as often."""
    for usage, elf, sass in zip(*(text.split(_CUBIN)[1:] for text in dump), strict=True):
        threads = {symbol: _threads(info) for symbol, info in _INFO.findall(elf)}
        names, bodies = _FUNCTION.split(sass)[1::2], _FUNCTION.split(sass)[2::2]
        instructions = {name: counted(body) for name, body in zip(names, bodies, strict=True)}
        for found in _USED.finditer(usage):
            body = instructions[found[1]]
            assert body is not None, "cuobjdump's answer is not understood"
            numbers = {name: int(found[name]) for name in ("registers", "stack", "local")}
            shared = declared(int(found["shared"]), capability)
            yield Kernel(found[1], capability, threads.get(found[1], 0), **numbers, shared=shared, instructions=body)


def declared(shared: int, capability: int) -> int:
    """Without what CUDA itself takes of a block: from sm_90 on cubins count it, where ptxas' own report does not."""
    return max(0, shared - SHARED_RESERVED) if capability >= 90 else shared


def release(dump: Dump) -> str:
    """ "13.0.88", of the ptxas that made the cubins; "" where they are of one that does not say."""
    return ", ".join(sorted(set(_RELEASE.findall(dump.elf))))


def _threads(info: str) -> int:
    found = _THREADS.search(info)
    return prod(int(size, 16) for size in found[1].split()) if found else 0


def tool() -> str:
    """cuobjdump: that of the CUDA toolkit, which knows what its own nvcc makes, or the copy in Triton's wheel. Raises NoTool."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found is None and find_spec("triton") is not None:
        from triton import knobs

        found = knobs.nvidia.cuobjdump.path
    if found is None:
        raise NoTool("there is no cuobjdump: neither on the path, nor in /usr/local/cuda/bin, nor that of Triton's wheel")
    return found
