"""Runs a comparison of methods: one run after the other in one process. A stopped comparison goes on where it was."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from kdkernels import recipes
from kdkernels.models import DetectorSpec, build_detector, load_detector
from kdkernels.recipes import TEACHER, Comparison
from kdkernels.training import TrainResult, init_student

from .bench import measurement
from .compare_plan import Arena, Job, Plan, digest, slug
from .compare_timing import mode_of, time_in_groups
from .console import Report, Stages
from .errors import UserError
from .stored_runs import ROW, StoredRuns, can_resume, describe_machine, write_json

STATE, TIMING = "comparison.json", "timing.json"

Row = dict[str, Any]


class Comparing:
    """A comparison in `folder`. `run` does what is not done yet; `results` is what there is."""

    def __init__(self, folder: Path, recipe: Comparison, asked: Plan, plan: Plan, stages: Stages) -> None:
        """asked: what `run` does. plan: all that was ever asked for."""
        self.folder, self.recipe, self.asked, self.plan, self.stages = folder, recipe, asked, plan, stages
        self.runs = StoredRuns(folder, stages)
        self.commit, self.changed = measurement("provenance").revision()

    @classmethod
    def stored(cls, folder: Path, stages: Stages) -> Comparing:
        """What is in the folder. Raises UserError where that is no comparison."""
        if not (folder / STATE).is_file():
            raise UserError(f"there is no comparison in {folder}")
        state = _read(folder / STATE)
        then = state["plan"]
        plan = Plan(tuple(then["detectors"]), tuple(then["methods"]), then["seeds"], then["aid"])
        return cls(folder, Comparison(**state["recipe"]), plan, plan, stages)

    @classmethod
    def opened(cls, folder: Path, recipe: Comparison, asked: Plan, stages: Stages, fresh: bool = False) -> Comparing:
        """A new comparison, or one that goes on with what an earlier one left in the folder, unless it should be `fresh`.

        Raises UserError for a folder with something else in it, or with a comparison by another recipe.
        """
        plan = asked
        if folder.exists() and any(folder.iterdir()):
            if not (folder / STATE).is_file():
                raise UserError(f"{folder} is not empty and no comparison's: --output names another folder")
            if fresh:
                for old in ("data", "runs"):
                    shutil.rmtree(folder / old, ignore_errors=True)
            else:
                before = cls.stored(folder, stages)
                changes = [f"{k} was {v}, is {asdict(recipe)[k]}" for k, v in asdict(before.recipe).items() if v != asdict(recipe)[k]]
                if changes:
                    raise UserError(
                        f"{folder} holds another comparison ({'; '.join(changes)}): --output names another folder, --fresh begins anew"
                    )
                plan = before.plan.joined(asked)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE, {"recipe": asdict(recipe), "plan": asdict(plan)})
        return cls(folder, recipe, asked, plan, stages)

    def run(self) -> None:
        """Train and time everything that was asked for and is not there."""
        recipe, runs = self.recipe, self.runs
        self.data = runs.data("train", recipe.train_images, recipe.train_seed), runs.data("val", recipe.val_images, recipe.val_seed)
        arenas = self.asked.arenas()
        teachers = [arena for arena in arenas if self._row(self._teacher(arena), self._teacher_digest(arena), True) is None]
        jobs = [job for job in self.asked.jobs() if self._row(self._folder(job), self._digest(job), True) is None]
        steps = len(teachers) * recipe.teacher_steps + len(jobs) * recipe.student_steps
        with self.stages.stage("all runs") as report:
            progress = Progress(self.stages, report, len(teachers) + len(jobs), steps)
            for arena in teachers:
                self._train_teacher(arena, progress)
            for arena in arenas:
                self._time(arena)
            for job in jobs:
                self._train_student(job, progress)

    def results(self) -> dict[str, Any]:
        """Everything that was ever asked for with this recipe, and of its rows those that are there."""
        jobs, arenas = self.plan.jobs(), self.plan.arenas()
        found = [self._row(self._folder(job), self._digest(job)) for job in jobs]
        teachers = {arena.name: self._row(self._teacher(arena), self._teacher_digest(arena)) for arena in arenas}
        return {
            "plan": asdict(self.plan),
            "recipe": asdict(self.recipe),
            "teachers": {name: row for name, row in teachers.items() if row is not None},
            "rows": [row for row in found if row is not None],
            "missing": [_about(job) for job, row in zip(jobs, found, strict=True) if row is None],
            "timing": {arena.name: self._timing(arena) for arena in arenas},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **describe_machine(),
        }

    def _folder(self, job: Job) -> Path:
        return self.folder / "runs" / slug(job.arena.name) / f"seed{job.seed}" / slug(job.label)

    def _teacher(self, arena: Arena) -> Path:
        return self.folder / "runs" / slug(arena.name) / TEACHER

    def _spec(self, arena: Arena, backbone: str) -> DetectorSpec:
        return self.recipe.spec(arena.detector, backbone, arena.distribution)

    def _teacher_digest(self, arena: Arena) -> str:
        recipe = self.recipe
        return digest(recipe, self._spec(arena, recipe.teacher), recipe.teacher_steps, recipe.teacher_seed, {})

    def _digest(self, job: Job) -> str:
        recipe, spec = self.recipe, self._spec(job.arena, self.recipe.student)
        return digest(recipe, spec, recipe.student_steps, job.seed, job.losses(), self._teacher_digest(job.arena))

    def _row(self, folder: Path, wanted: str, retry: bool = False) -> Row | None:
        """The row of a finished run. retry: one that failed does not count when the code may be another."""
        row = _read(folder / ROW)
        if row.get("hash") != wanted or not row.keys() & {"map", "error"}:
            return None
        same_code = self.commit is not None and row["commit"] == self.commit and not self.changed
        return None if retry and "error" in row and not same_code else row

    def _begin(self, folder: Path, wanted: str) -> Row:
        """The start of a row; what a stopped run of the same hash has left in the folder stays, for it to go on."""
        before = _read(folder / ROW)
        if before.get("hash") != wanted or "error" in before:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        row = {"hash": wanted, "commit": self.commit, "changed": self.changed}
        write_json(folder / ROW, row)
        return row

    def _train_teacher(self, arena: Arena, progress: Progress) -> None:
        recipe, folder, spec = self.recipe, self._teacher(arena), self._spec(arena, self.recipe.teacher)
        row, title = self._begin(folder, self._teacher_digest(arena)), f"{arena.name}: {TEACHER}"
        config = recipes.train_config(recipe, recipe.teacher_steps, recipe.teacher_seed, run_dir=str(folder), resume=can_resume(folder))
        self.runs.run_config(spec, config, None, {}).write(folder)
        with self.stages.stage(title) as report:
            result = self.runs.train(title, spec, config, self.data, None, {}, progress.beside(report))
        write_json(folder / ROW, {**row, "arena": arena.name, **_numbers(result)})
        progress.finished(title, f"mAP {100 * (result.map or 0):.1f}", recipe.teacher_steps)

    def _train_student(self, job: Job, progress: Progress) -> None:
        """Train, evaluate and keep the row; of a run that fails, why."""
        folder = self._folder(job)
        row = {**self._begin(folder, self._digest(job)), **_about(job), "losses": job.losses()}
        try:
            with self.stages.stage(job.title) as report:
                mode, result = self._student(job, folder, progress.beside(report))
            row |= {"mode": mode, **_numbers(result)}
            said = f"mAP {100 * row['map']:.1f}"
        except OSError:  # a full disk is not the method's fault
            raise
        except Exception as error:
            row["error"] = said = f"{type(error).__name__}: {error}"
        for weights in ("best.pt", "checkpoints/last.pt"):
            (folder / weights).unlink(missing_ok=True)
        write_json(folder / ROW, row)
        progress.finished(job.title, said, self.recipe.student_steps)

    def _student(self, job: Job, folder: Path, report: Report) -> tuple[str, TrainResult]:
        recipe, spec, entries = self.recipe, self._spec(job.arena, self.recipe.student), job.losses()
        losses, teacher = recipes.build_losses(entries), self._teacher(job.arena)
        more = {"run_dir": str(folder), "resume": can_resume(folder), "init_student": recipe.inherit, "mode": mode_of(losses)}
        config = recipes.train_config(recipe, recipe.student_steps, job.seed, **more)
        self.runs.run_config(spec, config, teacher, entries).write(folder)
        return config.mode, self.runs.train(job.title, spec, config, self.data, load_detector(teacher)[0], losses, report)

    def _time(self, arena: Arena) -> None:
        """What a step of each method that was asked for costs, unless that was measured."""
        path, spec = self._teacher(arena).with_name(TIMING), self._spec(arena, self.recipe.student)
        known, methods, hashes = _read(path), {}, {}
        for job in self.asked.jobs():
            if job.seed == 0 and job.arena == arena and job.method:
                hashes[job.label] = digest(self.recipe, spec, self.recipe.timing_rounds, 0, job.losses())
                before = known.get(job.label, {})
                if before.get("hash") != hashes[job.label] or "error" in before:
                    methods[job.label] = job.losses()
        if not methods:
            return
        torch.manual_seed(0)
        student, teacher = build_detector(spec), load_detector(self._teacher(arena))[0]
        init_student(student, teacher)
        for steps in time_in_groups(student, teacher, methods, self.data[0], self.recipe, self.stages, f"{arena.name}: timing"):
            for name, step in steps.items():
                known[name] = {**step, "hash": hashes.get(name), "commit": self.commit}
            write_json(path, known)
        self.stages.line(f"{arena.name}: timed the steps of {len(methods)} methods")

    def _timing(self, arena: Arena) -> dict[str, Any]:
        return _read(self._teacher(arena).with_name(TIMING))


class Progress:
    """All runs together: a bar over their steps, and after each run a line with the time left."""

    def __init__(self, stages: Stages, report: Report, runs: int, steps: int) -> None:
        self.stages, self.report, self.runs, self.steps = stages, report, runs, steps
        self.done_runs = self.done_steps = 0
        self.started = self.last = time.monotonic()

    def beside(self, own: Report) -> Report:
        """A callback for a run that also moves the bar of all."""

        def step(done: int, total: int) -> None:
            own(done, total)
            self.report(self.done_steps + done, self.steps)

        return step

    def finished(self, title: str, said: str, steps: int) -> None:
        self.done_runs, self.done_steps, now = self.done_runs + 1, self.done_steps + steps, time.monotonic()
        left = (now - self.started) / self.done_steps * (self.steps - self.done_steps) / 60
        self.stages.line(
            f"{self.done_runs}/{self.runs} {title}: {said}; {now - self.last:.0f} s, about {left // 60:.0f} h {left % 60:.0f} min left"
        )
        self.last = now


def _about(job: Job) -> dict[str, Any]:
    return {"arena": job.arena.name, "detector": job.arena.detector, "method": job.method, "aid": job.aid, "seed": job.seed}


def _numbers(result: TrainResult) -> Row:
    """AP in 0..1; kd: the distillation as it entered the loss, mean over the steps; task_loss: the detector's, mean of the last epoch."""
    assert result.run_dir is not None  # every run here has one
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kd = [value for record in records if math.isfinite(value := float(record.get("kd", math.nan)))]
    return {
        "map": result.map,
        "map50": result.map50,
        "parameters": result.parameters,
        "steps": result.steps,
        "step_ms": round(result.step_ms, 2),
        "train_seconds": round(result.train_seconds, 2),
        "kd": mean(kd) if kd else None,
        "task_loss": result.history[-1].get("loss"),
        "initial_weights": result.initial_weights,
        "data_order": result.data_order,
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
