"""The results as tables and as a page of the documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from math import prod
from typing import Any

from kdkernels.report.tables import Table, to_markdown

from .ceilings import COLD_SECONDS, OTHER_VARIANTS, REGISTERS, VARIANTS, WIDE, cold_seconds, words

Record = dict[str, Any]
COLUMNS = [
    "",
    "registers",
    "local",
    "shared",
    "fp64",
    "loads of pyramids",
    "stores to pyramids",
    "other loads",
    "other stores",
    "compile s",
]
OPERATOR_COLUMNS = ["", "kernels", "versions over all sizes", "cold compile s"]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """A table a kernel, and one of the operators and methods."""
    kernels = sorted(results["kernels"], key=lambda kernel: kernel["kernel"])
    found = [_kernels(name, list(group)) for name, group in groupby(kernels, key=lambda kernel: kernel["kernel"])]
    return [*found, _operators(results)]


def page(results: Mapping[str, Any]) -> str:
    """Markdown of docs/benchmarks/codegen.md."""
    versions = results["versions"]
    commit = "unknown" if results["commit"] is None else results["commit"][:10] + (" with changes" if results["dirty"] else "")
    parts = [
        "# What the compiler makes of the Triton kernels\n",
        "Made by `kdkernels bench codegen`, which needs no GPU: the launchers run on tensors that are never filled, and what they would "
        f"launch is compiled. Triton {versions['triton']}, torch {versions['torch']}, Python {versions['python']}, commit {commit}, "
        f"{results['time'][:10]}; another Triton gives other numbers. Compile seconds are those of {results['cpu']}.\n",
        "The file that this page is made of tells of which sources it is, and a test compares. Where a change concerns some operators "
        "only, `kdkernels bench codegen --operator NAMES --merge benchmarks/results/codegen.json` compiles these and puts them in the "
        "place of the old; it refuses where others launch a kernel that has changed. Without `--operator`, `--output` renews all.\n",
        f"Inputs are the P3..P7 of 800 x 1344 pixels with 256 channels, two images. Where a cell has several values, they are of "
        f"{', '.join(chips(results['kernels']))}, in this order.\n",
        "- rows: type and layout of the features, what the version is compiled for (words in capitals are constants of the kernel that its "
        "file explains), and the tensors that not all versions take. `PLACES` of `gradient` are, for product, sign and error, the places "
        "of the vectors along the outer and the inner axis; -1 stands for none, -2 where the summand is absent.\n"
        "- registers: of a thread; local: bytes a thread spills; shared: bytes of shared memory a program; fp64: instructions.\n"
        "- accesses: `4 x 16` are four instructions of 16 bytes a thread. A kernel holds a body for every kind of level, and sizes, being "
        "arguments, choose among them. So the values that a launch has are propagated through the PTX as constants, for the first and the "
        "last program of every level: counted is what these can reach, with the levels' H x W in front where they differ. An access that "
        "is reached may still be masked off; one that is not reached is never made. That the assembler has kept the wide ones is told by "
        "their number in the machine code.\n"
        f"- Checked: no local memory, no fp64, no atomics, at most {REGISTERS} registers; in `gradient` loads and "
        f"stores of {WIDE} bytes on every level whose image is a multiple of them; in `reduce` loads of {WIDE} bytes on every level whose "
        f"rows (H x W, channels_last C) are; versions over all sizes at most {OTHER_VARIANTS}{exceptions(VARIANTS)}; at most "
        f"{COLD_SECONDS:g} s to compile all kernels of a call.\n",
        *map(to_markdown, tables(results)),
    ]
    return "\n".join(parts)


def exceptions(ceilings: Mapping[str, int]) -> str:
    """ " (name 6, other 10)", for behind the number of the rest."""
    return f" ({', '.join(f'{name} {most}' for name, most in ceilings.items())})" if ceilings else ""


def chips(kernels: Iterable[Record]) -> list[str]:
    """Those that kernels were compiled for, in order."""
    return [f"sm_{chip}" for chip in sorted({kernel["capability"] for kernel in kernels})]


def _kernels(name: str, kernels: list[Record]) -> Table:
    """A row a version; what differs by capability stands side by side. Tensors that all versions have are left out."""
    always = set.intersection(*(set(kernel["given"]) for kernel in kernels))
    rows: dict[str, list[Record]] = {}
    for kernel in kernels:
        known = [
            kernel["dtype"],
            kernel["layout"],
            *words(kernel["flags"]),
            *(tensor for tensor in kernel["given"] if tensor not in always),
        ]
        known += [f"{key} {value}" for key, value in kernel["parameters"].items() if key in _parameters_that_differ(kernels)]
        label = ", ".join(filter(None, known)) or "all"
        # What else tells versions apart, as what Triton knows of a pointer or size, has no name.
        number = 1
        while any(other["capability"] == kernel["capability"] for other in rows.get(label, ())):
            number += 1
            label = f"{label.partition(' #')[0]} #{number}"
        rows.setdefault(label, []).append(kernel)
    return Table(f"{name}, {', '.join(chips(kernels))}", COLUMNS, [[label, *_cells(of_row)] for label, of_row in rows.items()])


def _parameters_that_differ(kernels: list[Record]) -> set[str]:
    """Block sizes and the like that are needed to tell versions of one type and layout apart."""
    found: dict[str, dict[str, set[int]]] = {}
    for kernel in kernels:
        key = str([kernel[field] for field in ("capability", "dtype", "layout", "given", "flags")])
        for name, value in kernel["parameters"].items():
            found.setdefault(key, {}).setdefault(name, set()).add(value)
    return {name for values in found.values() for name, one in values.items() if len(one) > 1}


def _cells(kernels: list[Record]) -> list[str]:
    kernels = sorted(kernels, key=lambda kernel: kernel["capability"])
    counts = [side_by_side(str(kernel[field]) for kernel in kernels) for field in ("registers", "local", "shared", "fp64")]
    ways = ("loads", "stores", "other_loads", "other_stores")
    seconds = " / ".join(f"{kernel['seconds']:.1f}" for kernel in kernels)
    return [*counts, *(side_by_side(_accesses(kernel["levels"], way) for kernel in kernels) for way in ways), seconds]


def side_by_side(values: Iterable[str]) -> str:
    """All values, or one if they are the same."""
    found = list(values)
    return " / ".join(found) if len(set(found)) > 1 else found[0]


def _accesses(levels: list[Record], way: str) -> str:
    """ "4 x 16", where levels differ with their H x W in front."""
    groups: dict[str, list[str]] = {}
    for level in levels:
        text = widths(level[way])
        groups.setdefault(text or "none", []).append(str(prod(level["shape"][2:])) if level["shape"] else "")
    if len(groups) == 1:
        return next(iter(groups)).replace("none", "")
    return "; ".join(f"{' '.join(sizes)}: {text}" for text, sizes in groups.items())


def widths(counts: Mapping[str, int]) -> str:
    """ "4 x 16, 1 x 4", the widest first."""
    return ", ".join(f"{count} x {width}" for width, count in sorted(counts.items(), key=lambda item: -int(item[0])))


def _operators(results: Mapping[str, Any]) -> Table:
    """A row an operator or method with its options; types and layouts as a range."""
    rows: dict[str, list[Record]] = {}
    for operator in results["operators"]:
        rows.setdefault(" ".join(filter(None, (operator["operator"], operator["options"]))), []).append(operator)
    return Table(
        "Operators and methods, of all types and layouts",
        OPERATOR_COLUMNS,
        [[name, *_operator(found, results["kernels"])] for name, found in rows.items()],
    )


def _operator(found: list[Record], kernels: list[Record]) -> list[str]:
    names = sorted({kernels[i]["kernel"] for operator in found for i in operator["kernels"]})
    counts = sorted(operator["variants"] for operator in found if operator["variants"] is not None)
    seconds = sorted(cold_seconds(operator, kernels) for operator in found)
    return [", ".join(names), _range(map(str, counts)), _range(f"{value:.1f}" for value in seconds)]


def _range(values: Iterable[str]) -> str:
    found = list(values)
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""
