"""What the commands print with: results on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

__all__ = ["Stages", "console", "error_console", "escape", "main_process", "note", "progress"]

#: Columns of output that goes to a file or a pipe.
WIDTH = 140
#: Seconds between two lines about the same work where there is no terminal for a bar.
LINE_EVERY = 15.0

Report = Callable[[int, int], None]


def console() -> Console:
    """Stdout. Made anew each time, because tests and callers exchange sys.stdout."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def error_console() -> Console:
    """Stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)


def note(text: str) -> None:
    """A line for the user that is not a result."""
    error_console().print(text, markup=False, highlight=False, soft_wrap=True)


def main_process() -> bool:
    """Whether this process is the one that prints, under torchrun or alone."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress(title: str) -> Iterator[Report | None]:
    """A callback (done, total) that moves a bar on a terminal; None, and nothing printed, elsewhere."""
    if not sys.stderr.isatty() or not main_process():
        yield None
        return
    with Stages() as stages, stages.stage(title) as report:
        yield report


class Stages:
    """Bars for pieces of work that follow each other; on a pipe, a line now and then. Used as a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=error_console(), transient=True)

    def __enter__(self) -> Stages:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        """A callback (done, total) for one piece of work."""
        if self._bar is None:
            yield self._lines(title)
            return
        task = self._bar.add_task(escape(title), total=None)
        try:
            yield lambda done, total: self._bar.update(task, completed=done, total=total)
        finally:
            self._bar.remove_task(task)

    def _lines(self, title: str) -> Report:
        start = last = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_EVERY:
                last = now
                self.line(f"{title}: {done}/{total}, {now - start:.0f} s")

        return report
