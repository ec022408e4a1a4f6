"""`kdkernels bench compare BASE HEAD`: arguments, and the comparison from checkouts to exit code."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..choices import rounds
from . import statistics
from .process import Worker
from .rounds import Result, Side, compare, exit_code
from .selection import NOTE, add_selection, select
from .table import document, markdown
from .worktrees import RevisionError, Tree, changed, checkouts, repository

#: Where compilers keep their results; each version gets folders of its own, empty at the start.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
EXIT_CODES = """exit codes:
  0  nothing is slower or broken
  1  something is slower, or broken (head fails the gate or crashes), or the comparison itself failed
  2  usage: unknown revision, unknown name
  3  something is undecided after the most rounds, or a control differs
  130  stopped with Ctrl-C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{NOTE}\n\n{EXIT_CODES}"
    parser.add_argument("base", metavar="BASE", help="git revision to compare against")
    parser.add_argument("head", metavar="HEAD", help='git revision to judge; "." is the working tree as it is')
    add_selection(parser)
    parser.add_argument("--threshold", type=_percent, default=0.03, metavar="PERCENT", help="what does not matter (default: 3)")
    parser.add_argument(
        "--max-rounds",
        type=rounds,
        default=20,
        metavar="N",
        help=f"most rounds for a cell that stays undecided, at least {statistics.FIRST} (default: %(default)s)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table, as on stdout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every ratio, with provenance")


def main(args: argparse.Namespace) -> int:
    try:
        with _terminated_as_interrupted():
            return _main(args)
    except RevisionError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("stopped; nothing is left behind")
        return 130


def _main(args: argparse.Namespace) -> int:
    wanted = select(args)
    if not wanted:
        _say("error: nothing to compare: no such case in --quick, or the entries have none of the modes")
        return 2
    top = repository(Path.cwd())
    for file in filter(None, (args.markdown, args.json)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if "." not in (args.base, args.head) and changed(top):
        _say('note: the working tree has changes that neither version has; "." measures them')
    with checkouts(top, args.base, args.head) as (base, head, folder):
        for tree in (base, head):
            _say(f"{tree.path.name}: {tree.name}{f'; {tree.build}' if tree.build else ''}")
        shutil.copytree(Path(__file__).parents[1], folder / "code" / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "results"))
        sides = (_side(base, folder, args), _side(head, folder, args))
        results = compare(wanted, sides, args.threshold, args.max_rounds, _progress(args.max_rounds))
        machine = sides[0].provenance or sides[1].provenance
        table = markdown(results, base, head, machine, args.threshold)
        print(table)
        if args.markdown:
            args.markdown.write_text(table, encoding="utf-8")
        if args.json:
            record = document(results, base, head, [side.provenance for side in sides], args.threshold, args.max_rounds)
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return exit_code(results)


def _side(tree: Tree, folder: Path, args: argparse.Namespace) -> Side:
    """Processes that import kdkernels from the tree, the benchmarks from the one copy, and keep compiled code in a folder of their own."""
    paths = [str(folder / "code"), str(tree.path), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {name: str(folder / f"{tree.path.name}-{name}") for name in CACHES}
    environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(paths), "KDKERNELS_BENCH_PARTIAL": "1"}
    command = [sys.executable, "-m", "benchmarks.compare.worker", str(tree.path), "--device", args.device, "--seed", str(args.seed)]
    if tree.build:
        command += ["--unbuilt", tree.build]
    if args.threads is not None:
        command += ["--threads", str(args.threads)]
    log = folder / f"{tree.path.name}.log"
    return Side(lambda describe: Worker([*command, *(["--describe"] if describe else [])], log, environment, folder / "code"))


def _progress(most: int) -> Callable[[int, Sequence[Result]], None]:
    started = time.monotonic()

    def tell(number: int, results: Sequence[Result]) -> None:
        left = sum(not result.verdict for result in results)
        seconds = time.monotonic() - started
        when = f" (first verdicts after round {statistics.FIRST})" if number < statistics.FIRST else ""
        decided = f"{len(results) - left} of {len(results)} cells decided{when}"
        _say(f"round {number} of at most {most}: {decided}; {seconds:.0f} s, {seconds / number:.0f} s a round")

    return tell


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM, as CI sends it, cleans up like Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _percent(text: str) -> float:
    value = float(text) / 100
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("wanted: more than 0 and less than 100")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
