"""What may not be exceeded, and the sentences about what was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..ceilings import REGISTERS, WIDE
from .names import arguments

Record = dict[str, Any]

#: Chips for which stack and local memory are held against 0; what other chips have of them is in the table.
WITHOUT_SPILLS = (80, 90)
#: Template arguments of the kernels that stream pyramids: an element's type, or that of mixed ones.
ELEMENTS = frozenset({"fp32", "fp16", "bf16", "Any"})
#: Kernels that write pyramids too.
WRITERS = frozenset({"Gradient", "Persistent"})


def broken(results: Mapping[str, Any]) -> list[str]:
    """A sentence for every ceiling that the results exceed."""
    return [f"{kernel['kernel']}, sm_{kernel['capability']}: {problem}" for kernel in results["kernels"] for problem in _kernel(kernel)]


def family(kernel: Record) -> str:
    """Its name without template arguments."""
    return kernel["kernel"].partition("<")[0]


def streams(kernel: Record) -> list[str]:
    """Which of its "loads" and "stores" are of pyramids."""
    if ELEMENTS.isdisjoint(arguments(kernel["kernel"])):
        return []
    return ["loads", "stores"] if family(kernel) in WRITERS else ["loads"]


def _kernel(kernel: Record) -> Iterator[str]:
    spilled = {
        "bytes of stack a thread": kernel["stack"],
        "bytes of local memory a thread": kernel["local"],
        "instructions on local memory": kernel["local_loads"] + kernel["local_stores"],
    }
    counts = {
        **(spilled if kernel["capability"] in WITHOUT_SPILLS else {}),
        "instructions in fp64": kernel["fp64"],
        "atomic instructions on values": kernel["atomics"],
    }
    yield from (f"{count} {what}" for what, count in counts.items() if count)
    if kernel["registers"] > REGISTERS:
        yield f"{kernel['registers']} registers a thread, more than {REGISTERS}"
    if not kernel["threads"]:
        yield "no launch bounds, or a function that was not inlined"
    elif not kernel["blocks"]:
        yield "a block does not fit a multiprocessor"
    for way in streams(kernel):
        if not any(int(width) >= WIDE for width in kernel[way]):
            yield f"no {way} of {WIDE} bytes"
