"""What the demo runs: data, teacher, students, and the rows of results.json. A stopped demo goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import kdkernels
from kdkernels import recipes
from kdkernels.models import DetectorSpec, load_detector
from kdkernels.recipes import EQUAL_TIME, PLAIN, STUDENTS, TEACHER, TIMED_BY, Recipe
from kdkernels.training import TrainResult
from kdkernels.training.feed import Feed

from .console import Report, Stages
from .errors import UserError
from .stored_runs import ROW, StoredRuns, can_resume, describe_machine, write_json

STATE, RESULTS = "demo.json", "results.json"
#: Execution order within a seed: the run that sets the equal time stands between the two that it is compared with.
ORDER = (PLAIN, TIMED_BY, EQUAL_TIME, *(name for name in STUDENTS if name not in (PLAIN, TIMED_BY, EQUAL_TIME)))
#: Bounds of "equal time" in multiples of the student's steps: a stalled machine shall not make a run of hours.
MOST_STEPS = 3

Row = dict[str, Any]


class DemoRun:
    """One demo in `folder`. `run` does what is not done yet and returns what is in results.json."""

    def __init__(self, folder: Path, seeds: int, recipe: Recipe, stages: Stages, fresh: bool = False) -> None:
        self.folder, self.seeds, self.recipe, self.stages = folder, range(seeds), recipe, stages
        self.runs = StoredRuns(folder, stages)
        self.seconds_before = self._open(fresh)
        self.started = time.monotonic()

    def run(self, report: Callable[[DemoRun, dict[str, Any]], None]) -> dict[str, Any]:
        """Everything; `report` is called at the end with the results and writes what stands beside results.json."""
        try:
            self.train_set = self.runs.data("train", self.recipe.train_images, self.recipe.train_seed)
            self.val_set = self.runs.data("val", self.recipe.val_images, self.recipe.val_seed)
            rows = [self._teacher_row()]
            teacher = load_detector(self.path(TEACHER))[0]
            for seed in self.seeds:
                found = {name: self._student_row(name, seed, teacher) for name in ORDER}
                rows += [found[name] for name in STUDENTS]
            seeds = {"train_seed": self.recipe.train_seed, "val_seed": self.recipe.val_seed}
            data = {**self.runs.describe_data(self.train_set, self.val_set), **seeds}
            results = {"data": data, "seconds": 0.0, "rows": rows, **self._describe_run()}
            self.stages.line("writing the report")
            results["seconds"] = self._seconds()
            report(self, results)
            write_json(self.folder / RESULTS, results)
            return results
        finally:
            self._save_state()

    def path(self, name: str, seed: int | None = None) -> Path:
        """The run folder of a row."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
        return self.folder / slug if seed is None else self.folder / f"seed{seed}" / slug

    def _open(self, fresh: bool) -> float:
        """Make the folder, or keep what a demo of the same recipe and code left there; returns the seconds that took."""
        state = self.folder / STATE
        if self.folder.exists() and any(self.folder.iterdir()):
            if not state.is_file():
                raise UserError(f"{self.folder} is not empty and no demo's: --output names another folder")
            values = json.loads(state.read_text(encoding="utf-8"))
            if values["hash"] == self._hash() and not fresh:
                self.stages.line(f"{self.folder}: keeping what is finished (--fresh runs it again)")
                return values["seconds"]
            for old in ("data", TEACHER, "pictures", *(p.name for p in self.folder.glob("seed[0-9]*"))):
                shutil.rmtree(self.folder / old, ignore_errors=True)
            (self.folder / RESULTS).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(state, {"hash": self._hash(), "recipe": asdict(self.recipe), "seconds": 0.0})
        return 0.0

    def _hash(self) -> str:
        return self.recipe.hash(code_hash(), torch.__version__)

    def _seconds(self) -> float:
        return round(self.seconds_before + time.monotonic() - self.started, 1)

    def _save_state(self) -> None:
        write_json(self.folder / STATE, {"hash": self._hash(), "recipe": asdict(self.recipe), "seconds": self._seconds()})

    def _teacher_row(self) -> Row:
        recipe, spec = self.recipe, recipes.teacher_spec()
        return self._row(TEACHER, recipe.teacher_seed, spec, recipe.teacher_steps, self.path(TEACHER), None)

    def _student_row(self, name: str, seed: int, teacher: nn.Module) -> Row:
        steps = self._equal_steps(seed) if name == EQUAL_TIME else self.recipe.student_steps
        return self._row(name, seed, recipes.student_spec(), steps, self.path(name, seed), teacher)

    def _equal_steps(self, seed: int) -> int:
        """Steps without distillation that take as long as the distilled run of the seed, by the medians of both."""
        ratio = step_seconds(self.path(TIMED_BY, seed)) / step_seconds(self.path(PLAIN, seed))
        return round(self.recipe.student_steps * min(max(ratio, 1.0), MOST_STEPS))

    def _row(self, name: str, seed: int, spec: DetectorSpec, steps: int, folder: Path, teacher: nn.Module | None) -> Row:
        """Train and evaluate one detector, or read the row that an earlier call finished."""
        done = folder / ROW
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))
        title = name if teacher is None else f"{name}, seed {seed}"
        with self.stages.stage(title) as progress:
            result = self._train(name, seed, spec, steps, folder, teacher, title, progress)
        row: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "map": result.map,
            "map50": result.map50,
            "parameters": result.parameters,
            "step_ms": round(result.step_ms, 2),
            "train_seconds": round(result.train_seconds, 2),
            "initial_weights": result.initial_weights,
            "data_order": self._data_order(name, seed, steps, result),
            "steps": result.steps,
            "learning_rate": result.learning_rate,
        }
        write_json(done, row)
        self.stages.line(f"{title}: mAP {100 * row['map']:.1f}, {steps} steps in {row['train_seconds']:.0f} s")
        return row

    def _train(
        self, name: str, seed: int, spec: DetectorSpec, steps: int, folder: Path, teacher: nn.Module | None, title: str, progress: Report
    ) -> TrainResult:
        losses = recipes.demo_losses(name, self.recipe) if teacher is not None else {}
        inherit = self.recipe.inherit and teacher is not None
        config = recipes.train_config(self.recipe, steps, seed, run_dir=str(folder), resume=can_resume(folder), init_student=inherit)
        entries = recipes.row_entries(name, self.recipe) if losses else {}
        self.runs.run_config(spec, config, self.path(TEACHER) if losses or inherit else None, entries).write(folder)
        return self.runs.train(title, spec, config, (self.train_set, self.val_set), teacher, losses, progress)

    def _data_order(self, name: str, seed: int, steps: int, result: TrainResult) -> str:
        """The hash of what was fed: for every student over the first `student_steps` steps, so that those of a seed can be compared.

        A longer run's own hash covers more steps. It is made again from the feed; that the two agree over all its steps shows that
        the shorter one is about the same images.
        """
        if name == TEACHER or steps == self.recipe.student_steps:
            return result.data_order
        feed = Feed(self.train_set, self.recipe.batch_size, seed)
        digest = prefix = ""
        for step in range(steps):
            digest = feed.extend_hash(digest, step // feed.steps_per_epoch, step % feed.steps_per_epoch)
            if step + 1 == self.recipe.student_steps:
                prefix = digest
        if digest != result.data_order:
            raise RuntimeError(f"{name}, seed {seed}: the images fed are not those that the seed gives")
        return prefix

    def _describe_run(self) -> dict[str, Any]:
        return {
            "inherit": self.recipe.inherit,
            "units": {"map": "COCO AP, 0..1", "map50": "COCO AP50, 0..1", "step_ms": "ms, median", "train_seconds": "s"},
            "data_order": f"of all students: over the first {self.recipe.student_steps} steps",
            "recipe": asdict(self.recipe),
            **describe_machine(),
        }


def step_seconds(folder: Path) -> float:
    """Median wall time of a step of a finished run, data loading included, in seconds."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return median(record["step_ms"] + record["data_ms"] for record in records) / 1e3


def code_hash() -> str:
    """SHA-256 of the package's sources without the parts that only print: other code may give other numbers."""
    package = Path(kdkernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0] not in ("cli", "report"):
            digest.update(f"{relative.as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
