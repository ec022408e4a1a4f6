"""`kdkernels bench codegen`: what the compiler makes of every Triton kernel, and whether it keeps within the ceilings. Needs no GPU."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kdkernels.report.tables import to_markdown

from ..measure.provenance import provenance
from ..registry import DTYPES
from .ceilings import broken
from .merge import Unmergeable, merged
from .table import tables

#: The sources of the kernels, and of what launches them.
KERNELS = Path(__file__).resolve().parents[2] / "kdkernels" / "triton"
CAPABILITIES = (80, 90, 100)
#: What the compiled code depends on, and where it was made.
KEPT = ("commit", "dirty", "versions", "cpu", "time")
SCHEMA = 1
#: Begins the lines of a worker's standard error that say how far it is.
PROGRESS = "progress: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--capability", type=int, nargs="+", default=list(CAPABILITIES), metavar="NN", help="compute capabilities; default: 80 90 100"
    )
    parser.add_argument("--kernel", default="", metavar="NAME", help="only kernels of this file of kdkernels/triton, or FILE.FUNCTION")
    parser.add_argument("--operator", nargs="+", default=[], metavar="NAME", help="only operators and methods of these names")
    parser.add_argument("--dtype", nargs="+", default=[], choices=list(DTYPES), help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the same as JSON")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", help="put the operators of --operator, for all chips and types, into this JSON of all of them"
    )


def main(args: argparse.Namespace) -> int:
    """0 within the ceilings; 1 one is exceeded, compiling failed, or merging; 2 nothing that can be compiled was asked for."""
    if find_spec("triton") is None:
        print("triton is not installed", file=sys.stderr)
        return 2
    if args.merge is not None and (args.kernel or args.dtype or not args.operator or args.capability != list(CAPABILITIES)):
        print("--merge takes whole operators: name them by --operator, without --kernel, --dtype and --capability", file=sys.stderr)
        return 2
    try:
        results = compiled(args.capability, args.kernel, args.operator, args.dtype)
    except CompilationFailed as error:
        print(error, file=sys.stderr)
        return 1
    if not results["kernels"]:
        print("there is no such kernel or operator", file=sys.stderr)
        return 2
    if args.merge is not None:
        try:
            whole = merged(json.loads(args.merge.read_text()), results)
        except Unmergeable as error:
            print(error, file=sys.stderr)
            return 1
        args.merge.write_text(to_json(whole), encoding="utf-8")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(to_json(results), encoding="utf-8")
    print("\n".join(map(to_markdown, tables(results))))
    problems = broken(results)
    for problem in problems:
        print(f"exceeded: {problem}", file=sys.stderr)
    return 1 if problems else 0


class CompilationFailed(RuntimeError):
    """With all that the process said."""


def compiled(
    capabilities: Sequence[int] = CAPABILITIES, kernel: str = "", operators: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> dict[str, Any]:
    """kernels and operators as the workers tell them, one worker a capability; where that was, and of which `sources`.

    Raises CompilationFailed.
    """
    of = sources()
    options = [*(["--kernel", kernel] if kernel else []), "--operator", *operators, "--dtype", *dtypes]
    # Which versions there are depends on no capability.
    jobs = [["--capability", str(one), *options, *(["--variants"] if one == capabilities[0] else [])] for one in capabilities]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(_worker, jobs))
    kernels: list[dict[str, Any]] = []
    found = []
    for part in parts:
        found += [{**one, "kernels": [i + len(kernels) for i in one["kernels"]]} for one in part["operators"]]
        kernels += part["kernels"]
    made = provenance(torch.device("cpu"), 0)
    return {"schema": SCHEMA, **{name: made[name] for name in KEPT}, "sources": of, "kernels": kernels, "operators": found}


def sources() -> str:
    """SHA-256 of all files of kdkernels/triton: results with another one may be those of other kernels."""
    found = hashlib.sha256()
    for file in sorted(KERNELS.glob("*.py")):
        found.update(f"{file.name}\n{file.read_text(encoding='utf-8')}\n".encode())
    return found.hexdigest()


def _worker(options: Sequence[str]) -> dict[str, Any]:
    package = __package__ or ""
    root = Path(__file__).resolve().parents[len(package.split("."))]
    with TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {
            "TRITON_CACHE_DIR": cache,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-m", f"{package}.worker", *options]
        answer = Path(cache) / "answer.json"
        with (
            answer.open("w") as stdout,
            subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True) as worker,
        ):
            assert worker.stderr is not None
            said = []
            for line in worker.stderr:
                if line.startswith(PROGRESS):
                    print(line.removeprefix(PROGRESS), end="", file=sys.stderr, flush=True)
                else:
                    said.append(line)
        if worker.returncode != 0:
            raise CompilationFailed("".join(said))
        return json.loads(answer.read_text())


def to_json(results: dict[str, Any]) -> str:
    """A line a record, for `git diff`."""
    short = partial(json.dumps, separators=(",", ":"))
    lines = [f"{short(name)}:{short(value)}" for name, value in results.items() if not isinstance(value, list)]
    for name in (name for name, value in results.items() if isinstance(value, list)):
        lines.append(f"{short(name)}:[\n" + ",\n".join(map(short, results[name])) + "\n]")
    return "{" + ",\n".join(lines) + "}\n"
