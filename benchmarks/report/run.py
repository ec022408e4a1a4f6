"""`kdkernels bench report`: a Markdown page and pictures for every device that has result files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch

from ..measure.records import default_path, newest, read
from . import origin
from .cells import Record
from .page import page

NAMES = ("kernels.jsonl", "steps.jsonl", "scaling.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--results",
        type=Path,
        default=default_path(torch.device("cpu"), "kernels").parents[1],
        metavar="DIR",
        help=f"folder with a folder a device, each with one or more of {', '.join(NAMES)}",
    )
    source.add_argument("--input", type=Path, nargs="+", metavar="FILE", help="one device's result files instead")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="default: %(default)s")


def main(args: argparse.Namespace) -> int:
    """0 done; 1 nothing there to report; 2 a file that was named is not there."""
    missing = [str(path) for path in args.input or () if not path.is_file()]
    if missing:
        print(f"no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    if args.input:
        records = load(args.input)
        sources = {origin.label(records): args.input} if records else {}
    else:
        sources = result_files(args.results)
    if not any(load(paths) for paths in sources.values()):
        places = ", ".join(map(str, args.input or [args.results]))
        print(f"no {' or '.join(NAMES)} in {places}; name other files with --input", file=sys.stderr)
        return 1
    for written in write(sources, args.output):
        print(written)
    return 0


def result_files(results: Path) -> dict[str, list[Path]]:
    """Device label -> its files of `NAMES`, those that exist."""
    found = {folder.name: [folder / name for name in NAMES if (folder / name).is_file()] for folder in sorted(results.glob("*/"))}
    return {label: paths for label, paths in found.items() if paths}


def load(paths: Sequence[Path]) -> list[Record]:
    """The newest record of everything in the files, in their order."""
    return [record for path in paths for record in newest(read(path))]


def write(sources: Mapping[str, Sequence[Path]], output: Path) -> list[Path]:
    """<label>.md and <label>-<picture>.png for every label; without matplotlib no pictures, which standard error then says."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for label, paths in sources.items():
        records = load(paths)
        pictures = _draw(records, label, output, fingerprint(paths))
        path = output / f"{label}.md"
        path.write_text(page(label, records, [picture.name for picture in pictures]), encoding="utf-8")
        written += [path, *pictures]
    return written


def _draw(records: list[Record], label: str, output: Path, source: str) -> list[Path]:
    try:
        from .plots import save_figures
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return []
    return save_figures(records, label, output, source)


def fingerprint(paths: Sequence[Path]) -> str:
    """What the pictures carry about the files they are drawn from."""
    return ", ".join(f"{path.name} sha256 {sha256(path.read_bytes()).hexdigest()}" for path in paths)
