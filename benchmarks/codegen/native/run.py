"""`kdkernels bench native-codegen`: what nvcc has made of the native library's CUDA kernels, and whether it keeps within the ceilings."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kdkernels import native
from kdkernels.report.tables import to_markdown

from ...measure.provenance import provenance
from ..disassembly import by_width
from ..run import to_json
from . import library
from .ceilings import broken
from .names import kernel_name
from .occupancy import SHARED, occupancy
from .table import table

SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--library", type=Path, metavar="FILE", help="default: _C_cuda of this installation")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the same as JSON")


def main(args: argparse.Namespace) -> int:
    """0 within the ceilings; 1 one is exceeded; 2 there is no such library, nothing in it, or nothing to read it with."""
    file, reason = (args.library, "") if args.library is not None else native.library("cuda")
    if file is None or not file.is_file():
        print(reason or f"no such file: {file}", file=sys.stderr)
        return 2
    try:
        results = inspected(file)
    except (library.NoTool, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{file.name}: {error.stderr.strip()}", file=sys.stderr)
        return 2
    if not results["kernels"]:
        print(f"{file.name} has no kernels for {', '.join(f'sm_{chip}' for chip in SHARED)}", file=sys.stderr)
        return 2
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(to_json(results), encoding="utf-8")
    print(to_markdown(table(results)))
    problems = broken(results)
    for problem in problems:
        print(f"exceeded: {problem}", file=sys.stderr)
    return 1 if problems else 0


def inspected(file: Path) -> dict[str, Any]:
    """The kernels of a library, of the chips that `occupancy` knows, and what it was built with.

    Raises NoTool, CalledProcessError for what is no such library, and ValueError for two different kernels of one name.
    """
    found = {chip: dump for chip, dump in sorted(library.dumps(file).items()) if chip in SHARED}
    made, built = provenance(torch.device("cpu"), 0), native.build_info(file.parent)
    compiler = built.get("cuda", {}).get("compiler", "")
    releases = sorted({release for dump in found.values() if (release := library.release(dump))})
    return {
        "schema": SCHEMA,
        **{name: made[name] for name in ("commit", "dirty", "time")},
        "nvcc": ", ".join(releases) or compiler.partition(",")[0],
        "torch": built.get("torch"),
        "kernels": records([kernel for chip, dump in found.items() for kernel in library.kernels(chip, dump)]),
    }


def records(kernels: list[library.Kernel]) -> list[dict[str, Any]]:
    """A record each, by name and chip. What several files share is there once. Raises ValueError for different kernels of one name."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for kernel in kernels:
        made = record(kernel)
        if found.setdefault((made["kernel"], kernel.capability), made) != made:
            raise ValueError(f"two different kernels are called {made['kernel']}, sm_{kernel.capability}")
    return [found[key] for key in sorted(found)]


def record(kernel: library.Kernel) -> dict[str, Any]:
    """JSON has no numbers as keys: widths in bytes are text. atomics: those on something else than counters."""
    fits = occupancy(kernel.capability, kernel.threads, kernel.registers, kernel.shared) if kernel.threads else None
    counts = kernel.instructions
    return {
        "kernel": kernel_name(kernel.symbol),
        "capability": kernel.capability,
        "threads": kernel.threads,
        "registers": kernel.registers,
        "shared": kernel.shared,
        "stack": kernel.stack,
        "local": kernel.local,
        "local_loads": counts.local_loads,
        "local_stores": counts.local_stores,
        "blocks": fits.blocks if fits else None,
        "occupancy": round(fits.warps, 1) if fits else None,
        "limits": list(fits.limits) if fits else [],
        "loads": by_width(counts.loads),
        "stores": by_width(counts.stores),
        "bulk": counts.bulk,
        "counters": counts.counters,
        "atomics": counts.atomics - counts.counters,
        "fp64": counts.fp64,
    }
