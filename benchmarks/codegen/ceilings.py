"""What may not be exceeded, and the sentences about what was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Record = dict[str, Any]

#: Of a thread: with more, fewer than two programs of 256 threads fit beside each other's.
REGISTERS = 128
#: Operator or method -> versions of all its kernels together that one type and layout may compile, over all batches and image sizes, for
#: which none may be compiled besides.
VARIANTS: dict[str, int] = {
    **{"gkd": 6, "bmfi": 10, "aid_bmfi": 10, "gkd_bmfi": 12, "gkd_imitation": 11, "fitnets": 6},
    **{"fgd": 21, "gmask": 22, "emask": 22, "teacher_cam": 24, "cam_gmask": 24, "cam_only": 7},
}
OTHER_VARIANTS = 4
#: Seconds in which all kernels of one operator or method, one type and layout, are compiled from nothing.
COLD_SECONDS = 30.0
#: Bytes of the widest access that every GPU has.
WIDE = 16
#: Files of kernels whose accesses to pyramids are all wide wherever an image of the level, or a row of its matrix, is whole vectors.
WRITE_PASS, READ_PASS = "gradient", "reduce"


def broken(results: Mapping[str, Any]) -> list[str]:
    """A sentence for every ceiling that the results exceed."""
    found = [problem for kernel in results["kernels"] for problem in _kernel(kernel)]
    return found + [problem for operator in results["operators"] for problem in _operator(operator, results["kernels"])]


def name(kernel: Record) -> str:
    """In a sentence: which compiled version it is."""
    known = [kernel["kernel"], kernel["dtype"], kernel["layout"], *words(kernel["flags"]), *kernel["given"]]
    return f"{' '.join(filter(None, known))}, sm_{kernel['capability']}"


def words(flags: Mapping[str, Any]) -> list[str]:
    """The flags that are set, without the names of those that are words themselves."""
    found = {name: value for name, value in flags.items() if value is not False}
    return [name if value is True else value if isinstance(value, str) else f"{name} {value}" for name, value in found.items()]


def _kernel(kernel: Record) -> Iterator[str]:
    counts = {
        "bytes of spilled registers": kernel["local"],
        "instructions in fp64": kernel["fp64"],
        "atomic instructions": kernel["atomics"],
        "accesses to an unknown address": kernel["unknown"],
        "axes of the grid besides x": kernel["axes"],
    }
    yield from (f"{name(kernel)}: {count} {what}" for what, count in counts.items() if count)
    if kernel["registers"] > REGISTERS:
        yield f"{name(kernel)}: {kernel['registers']} registers a thread, more than {REGISTERS}"
    for way in ("loads", "stores"):
        # Of small inputs the assembler may leave out lanes that nobody uses.
        if kernel["dtype"] and _wide(kernel["machine"][way]) < _wide(kernel["text"][way]):
            yield f"{name(kernel)}: the assembler has split {way} of {WIDE} bytes"
    for level in kernel["levels"]:
        for way in ("loads", "stores"):
            narrow = [width for width in level[way] if int(width) < WIDE]
            if narrow and _wanted_wide(kernel, level, way):
                yield f"{name(kernel)}: {way} of {', '.join(narrow)} bytes on levels of {tuple(level['shape'])}"


def _wide(widths: Mapping[str, int]) -> int:
    return sum(count for width, count in widths.items() if int(width) >= WIDE)


def _wanted_wide(kernel: Record, level: Record, way: str) -> bool:
    _, channels, height, width = level["shape"]
    file = kernel["kernel"].partition(".")[0]
    if file == WRITE_PASS:
        return channels * height * width * level["itemsize"] % WIDE == 0
    row = channels if kernel["layout"] == "channels_last" else height * width
    return file == READ_PASS and way == "loads" and row * level["itemsize"] % WIDE == 0


def _operator(operator: Record, kernels: list[Record]) -> Iterator[str]:
    who = " ".join(filter(None, (operator["operator"], operator["options"], operator["dtype"], operator["layout"])))
    most = VARIANTS.get(operator["operator"], OTHER_VARIANTS)
    if operator["variants"] is not None:
        if operator["variants"] > most:
            yield f"{who}: {operator['variants']} compiled versions, more than {most}"
        if operator["variants"] > len(operator["kernels"]):
            yield f"{who}: {operator['variants']} compiled versions over all sizes and batches, but {len(operator['kernels'])} for one"
    seconds = cold_seconds(operator, kernels)
    if seconds > COLD_SECONDS:
        yield f"{who}, sm_{operator['capability']}: {seconds:.1f} s to compile, more than {COLD_SECONDS:g}"


def cold_seconds(operator: Record, kernels: list[Record]) -> float:
    """What its first call spends on compiling."""
    return sum(kernels[i]["seconds"] for i in operator["kernels"])
