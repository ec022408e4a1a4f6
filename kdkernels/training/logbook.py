"""Where a run writes what happens: metrics.jsonl, train.log, the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

Value = float | int | str | None


class Logbook:
    """Files in `run_dir` (none when it is None) and lines or, on a terminal, a progress bar on stderr.

    A run that is resumed at step k keeps the records of steps up to k. Used as a context manager.
    """

    def __init__(self, run_dir: Path | None, total: int, done: int, console: bool) -> None:
        self.console = console
        self._steps = self._text = None
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            metrics = run_dir / "metrics.jsonl"
            kept = _records_until(metrics, done) if done else []
            metrics.write_text("".join(kept), encoding="utf-8")
            self._steps = metrics.open("a", encoding="utf-8", buffering=1)
            self._text = (run_dir / "train.log").open("a" if done else "w", encoding="utf-8", buffering=1)
        self._bar = _bar(total, done) if console and sys.stderr.isatty() else None

    def step(self, record: dict[str, Value]) -> None:
        """A step's JSON line; floats that are not finite are written as strings, as JSON has none."""
        if self._steps is not None:
            clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self._steps.write(json.dumps(clean) + "\n")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record["step"], description=f"loss {record['loss']:.3f}")

    def line(self, text: str) -> None:
        """A line for a person, into train.log and to stderr."""
        if self._text is not None:
            self._text.write(text + "\n")
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.console:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Logbook:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for file in (self._steps, self._text):
            if file is not None:
                file.close()


def epoch_line(entry: dict[str, Any], epochs: int) -> str:
    """The line of an epoch: task loss, every distillation loss, gradient norm and AP."""
    parts = [f"epoch {entry['epoch']}/{epochs}", f"step {entry['step']}", f"loss {entry.get('loss', math.nan):.4f}"]
    parts += [f"{k.removeprefix('kd/')} {v:.4g}" for k, v in entry.items() if k.startswith("kd/") and "/" not in k[3:]]
    parts += [f"grad {entry.get('grad_norm', math.nan):.3g}", f"lr {entry['lr']:.2e}", f"{entry['step_ms']:.0f} ms/step"]
    if "bbox/AP" in entry:
        parts.append(f"AP {100 * entry['bbox/AP']:.2f}  AP50 {100 * entry['bbox/AP50']:.2f}")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> float | None:
    """MiB: the most the allocator held on a GPU, the most resident memory of this process on a CPU (None where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return None


def _records_until(path: Path, step: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = []
    for line in lines:
        # A process that was killed may have left half a line.
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def _bar(total: int, done: int) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=total, completed=done)
    return bar
