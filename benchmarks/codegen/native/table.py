"""The results as a table and as a page of the documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from kdkernels.report.tables import Table, to_markdown

from ..ceilings import REGISTERS, WIDE
from ..table import chips, side_by_side, widths
from .ceilings import WITHOUT_SPILLS, WRITERS

Record = dict[str, Any]
#: Column -> what stands there of one kernel on one chip.
COLUMNS = {
    "threads": lambda kernel: str(kernel["threads"]),
    "registers": lambda kernel: str(kernel["registers"]),
    "shared": lambda kernel: str(kernel["shared"]),
    "stack": lambda kernel: str(max(kernel["stack"], kernel["local"])),
    "spills": lambda kernel: str(kernel["local_loads"] + kernel["local_stores"]),
    "blocks": lambda kernel: str(kernel["blocks"] or 0),
    "occupancy, %": lambda kernel: f"{kernel['occupancy'] or 0:g}",
    "limited by": lambda kernel: ", ".join(kernel["limits"]),
    "loads": lambda kernel: widths(kernel["loads"]),
    "stores": lambda kernel: widths(kernel["stores"]),
    "bulk copies": lambda kernel: str(kernel["bulk"]),
    "counters": lambda kernel: str(kernel["counters"]),
    "other atomics": lambda kernel: str(kernel["atomics"]),
    "fp64": lambda kernel: str(kernel["fp64"]),
}


def table(results: Mapping[str, Any]) -> Table:
    """A row a kernel; what differs by chip stands side by side."""
    kernels = sorted(results["kernels"], key=lambda kernel: (kernel["kernel"], kernel["capability"]))
    rows = []
    for name, of_name in groupby(kernels, key=lambda kernel: kernel["kernel"]):
        found = list(of_name)
        rows.append([f"`{name}`", *(side_by_side(map(cell, found)) for cell in COLUMNS.values())])
    return Table(f"Kernels, {', '.join(chips(kernels))}", ["", *COLUMNS], rows)


def page(results: Mapping[str, Any]) -> str:
    """Markdown of docs/benchmarks/native-codegen.md."""
    commit = "unknown" if results["commit"] is None else results["commit"][:10] + (" with changes" if results["dirty"] else "")
    parts = [
        "# What nvcc makes of the native CUDA kernels\n",
        "Made by `kdkernels bench native-codegen`, which needs no GPU: cuobjdump tells what is in the compiled library. "
        f"nvcc {results['nvcc']}, torch {results['torch']}, commit {commit}, {results['time'][:10]}; another nvcc gives other numbers. "
        f"Where a cell has several values, they are of {', '.join(chips(results['kernels']))}, in this order.\n",
        "- rows: functors of `csrc/cuda` with their template arguments. An element's type is that of all pyramids of the call, `Any` that "
        "of calls with several.\n"
        "- threads: of a block; registers: of a thread; shared: bytes of shared memory that a block declares; stack: bytes of a thread; "
        "spills: instructions that load or store local memory, which spilled registers lie in.\n"
        "- blocks: of a multiprocessor at a time; occupancy: their warps in per cent of the 64 that it can hold; limited by: what keeps "
        "another block from fitting. Computed from the limits in the CUDA C++ Programming Guide, as the toolkit's cuda_occupancy.h does.\n"
        "- loads, stores: instructions on global memory in all bodies of the kernel; `4 x 16` are four of 16 bytes a thread. Narrow ones "
        "are of maps, vectors and single elements at the ends of rows.\n"
        "- counters: atomic additions to whole numbers, by which blocks take turns; values never go through atomics.\n"
        f"- Checked: no stack and no spills for {_chips(WITHOUT_SPILLS)}; for all chips no fp64, no atomics but on counters, at most "
        f"{REGISTERS} registers; in kernels of an element's type loads of {WIDE} bytes, in "
        f"{_named(WRITERS)} stores too.\n",
        to_markdown(table(results)),
    ]
    return "\n".join(parts)


def _chips(capabilities: Iterable[int]) -> str:
    return " and ".join(f"sm_{capability}" for capability in capabilities)


def _named(kernels: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in sorted(kernels))
