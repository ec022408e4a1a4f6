"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from kdkernels.data import Augment, DetectionDataset
from kdkernels.losses import DistillationLoss
from kdkernels.models import DetectorSpec, write_model_json

from . import checkpoint
from .config import TrainConfig
from .ema import Ema
from .feed import Batch, Feed
from .initialise import freeze_batchnorm, init_student, state_hash
from .interrupt import Interrupt
from .logbook import Logbook, epoch_line, peak_memory
from .machine import Machine, as_teachers
from .optimizer import kd_factor, make_optimizer, set_rate
from .result import TrainingDiverged, TrainingInterrupted, TrainResult


class Loop:
    """State of a run. `run` trains; `close` takes hooks off the models."""

    def __init__(
        self,
        model: nn.Module,
        spec: DetectorSpec | None,
        train_set: DetectionDataset,
        val_set: DetectionDataset | None,
        config: TrainConfig,
        teacher: Any,
        losses: Mapping[str, DistillationLoss] | None,
        console: bool,
        progress: Callable[[int, int], None] | None,
        evaluate: Callable[[nn.Module, DetectionDataset], dict[str, float]] | None,
    ) -> None:
        if config.teacher_ema and teacher is not None:
            raise ValueError("teacher_ema makes the student's average its teacher, so there can be no other")
        if config.teacher_ema and not losses:
            raise ValueError("teacher_ema needs losses by which the average teaches")
        if losses and teacher is None and not config.teacher_ema:
            raise ValueError("losses were given without a teacher")
        if config.init_student and teacher is None:
            raise ValueError("init_student needs a teacher to inherit from")
        if config.run_dir is not None and spec is None:
            raise ValueError("a run folder needs the detector's spec, or nobody could load its weights")
        self.config, self.spec = config, spec
        self.run_dir = Path(config.run_dir) if config.run_dir is not None else None
        self.machine = Machine(config)
        self.val_set, self.progress, self.evaluate = val_set, progress, evaluate or self.machine.coco
        if config.augment and train_set.transform is None:
            train_set = train_set.with_transform(Augment())
        self.classes = train_set.classes
        shard = (self.machine.rank, self.machine.processes)
        self.feed = Feed(train_set, config.batch_size, config.seed, config.accumulation, *shard, config.workers)
        self.total = config.steps or config.epochs * self.feed.steps_per_epoch
        self.epochs = math.ceil(self.total / self.feed.steps_per_epoch)
        self.console = console and self.machine.main
        self._prepare(model, teacher, losses)
        # Everything below, with the states of the parts above, is what a checkpoint holds.
        self.step = 0
        self.data_order = ""
        self.history: list[dict[str, Any]] = []
        self.step_times: list[float] = []
        self.seconds = 0.0
        self.best: float | None = None
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.bad_steps = 0

    def _prepare(self, model: nn.Module, teacher: Any, losses: Mapping[str, DistillationLoss] | None) -> None:
        config, machine = self.config, self.machine
        model.train()
        self.inherited = None
        if config.init_student:
            first = as_teachers(teacher)[0]
            self.inherited = init_student(model, getattr(first, "model", first))
        self.initial_weights = state_hash(model)
        if config.freeze_batchnorm:
            freeze_batchnorm(model)
        machine.seed_everything()
        self.model = model
        machine.place(model)
        self.ema = machine.ema(model)
        self.teacher = Ema(model, config.teacher_ema) if config.teacher_ema else None
        if self.teacher is not None:
            teacher = self.teacher.model
        self.student = machine.wrap(model)
        self.distiller = machine.distiller(self.student, teacher, losses, lambda: next(self.feed.steps(0))[0])
        extra = self.distiller.trainable.parameters() if self.distiller is not None else ()
        self.parameters = [p for p in (*self.student.parameters(), *extra) if p.requires_grad]
        self.optimizer = machine.wrap_optimizer(make_optimizer(config, self.parameters))

    def close(self) -> None:
        if self.distiller is not None:
            self.distiller.close()

    def run(self) -> TrainResult:
        """Train to the end."""
        if self.config.resume:
            self._resume()
        elif self.run_dir is not None and self.spec is not None and self.machine.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.config.write(self.run_dir / "config.yaml")
            write_model_json(self.run_dir / "model.json", self.spec, self.classes)
        files = self.run_dir if self.machine.main else None
        with Logbook(files, self.total, self.step, self.console) as self.log, Interrupt() as self.interrupt:
            if self.step:
                self.log.line(f"resumed at step {self.step} of {self.total}")
            elif self.inherited:
                self.log.line(str(self.inherited))
            per_epoch = self.feed.steps_per_epoch
            while True:
                if self.step and len(self.history) < math.ceil(self.step / per_epoch) and self._at_epoch_end():
                    self._end_epoch()
                if self.step >= self.total:
                    break
                self._epoch(self.step // per_epoch, self.step % per_epoch)
        return self._result()

    def _at_epoch_end(self) -> bool:
        return self.step == self.total or self.step % self.feed.steps_per_epoch == 0

    def _epoch(self, epoch: int, first: int) -> None:
        self.student.train()
        if self.config.freeze_batchnorm:
            freeze_batchnorm(self.model)
        start = time.perf_counter()
        for offset, batches in enumerate(self.feed.steps(epoch, first)):
            loaded = time.perf_counter()
            stop = self._step(epoch, first + offset, batches, data_ms=1e3 * (loaded - start))
            now = time.perf_counter()
            self.seconds += now - start
            start = now
            if self.step == self.total:
                break
            if stop:
                self._stop_here()

    def _step(self, epoch: int, in_epoch: int, batches: list[Batch], data_ms: float) -> bool:
        """One optimiser step; returns whether the run should stop after it."""
        machine, start = self.machine, time.perf_counter()
        factor = kd_factor(self.config, self.step, self.total)
        rate = set_rate(self.config, self.optimizer, self.step, self.total)
        values: dict[str, Tensor] = {}
        for images, targets in batches:
            for name, value in self._backward(images, targets, factor).items():
                values[name] = values.get(name, 0) + value.detach().float() / len(batches)
        norm = machine.clip(self.parameters, self.config.clip_norm)
        bad_gradient = not math.isfinite(norm)
        if bad_gradient and not machine.scales:
            self.optimizer.zero_grad()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
            for average in (self.ema, self.teacher):
                if average is not None and not bad_gradient:
                    average.update(self.model)
        numbers, stop = machine.average(values, self.interrupt.requested)
        elapsed = time.perf_counter() - start
        self.data_order = self.feed.extend_hash(self.data_order, epoch, in_epoch)
        self.step += 1
        self.step_times.append(elapsed)
        record = _record(numbers, factor, self.distiller is not None)
        record |= {"grad_norm": norm, "lr": rate, "step_ms": 1e3 * elapsed, "data_ms": data_ms, "memory_mib": peak_memory(machine.device)}
        self.log.step({"step": self.step, "epoch": epoch + 1, **record})
        self._check_finite(record, bad_gradient)
        for key, value in record.items():
            if value is not None and math.isfinite(value):
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.counts[key] = self.counts.get(key, 0) + 1
        if self.progress is not None:
            self.progress(self.step, self.total)
        return stop

    def _backward(self, images: list[Tensor], targets: list[dict[str, Any]], factor: float) -> dict[str, Tensor]:
        """Forward and backward of one batch; returns the values of all losses, distillation unscaled."""
        machine = self.machine
        images, targets = machine.to_device(images, targets)
        with machine.step_context(self.student):
            with machine.autocast():
                losses = (self.distiller or self.student)(images, targets)
                task = sum(v.float() for k, v in losses.items() if not k.startswith("kd_"))
                distilled = [v.float() for k, v in losses.items() if k.startswith("kd_")]
                total = task + factor * sum(distilled) if distilled else task
            machine.backward(total)
        values = {f"loss/{k}": v for k, v in losses.items() if not k.startswith("kd_")}
        if self.distiller is not None:
            values |= {f"kd/{k.removeprefix('kd_')}": v for k, v in self.distiller.last_values().items()}
        return values

    def _check_finite(self, record: dict[str, Any], bad_gradient: bool) -> None:
        """Report non-finite terms, and stop when they persist."""
        terms = [k for k, v in record.items() if k.startswith(("loss", "kd")) and isinstance(v, float) and not math.isfinite(v)]
        if not terms and not bad_gradient:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        if self.distiller is not None:
            terms += [str(report) for report in self.distiller.check()]
        what = ", ".join(terms) or "the gradient (every loss is finite)"
        self.log.line(f"step {self.step}: not finite: {what}{'; the weights were left as they are' if bad_gradient else ''}")
        if self.bad_steps >= self.config.nonfinite_patience:
            raise TrainingDiverged(f"training stopped at step {self.step}: {self.bad_steps} steps in a row were not finite: {what}")

    def _end_epoch(self) -> None:
        epoch = math.ceil(self.step / self.feed.steps_per_epoch)
        # Means over the steps whose value was finite.
        entry: dict[str, Any] = {"epoch": epoch, "step": self.step, **{k: v / self.counts[k] for k, v in self.sums.items()}}
        due = self.step == self.total or (self.config.eval_every and epoch % self.config.eval_every == 0)
        if due and self.val_set is not None:
            self._save()  # evaluation may be long, and Ctrl-C in it should cost nothing: `run` comes back here
            entry |= self._evaluate(self.val_set)
        self.sums, self.counts = {}, {}
        self.history.append(entry)
        self.log.line(epoch_line(entry, self.epochs))
        self._save()

    def _evaluate(self, val_set: DetectionDataset) -> dict[str, float]:
        model = self.ema.model if self.ema is not None else self.model
        found = self.machine.on_main(lambda: self.evaluate(model, val_set))
        if self.best is None or found["bbox/AP"] > self.best:
            self.best = found["bbox/AP"]
            if self.run_dir is not None and self.machine.main:
                checkpoint.save(_plain(model), self.run_dir / checkpoint.BEST)
        return found

    def _stop_here(self) -> None:
        self._save()
        where = f"; continue with resume in {self.run_dir}" if self.run_dir is not None else ""
        message = f"interrupted at step {self.step} of {self.total}{where}"
        self.log.line(message)
        raise TrainingInterrupted(message)

    def _save(self) -> None:
        """Write last.pt. Called by every process, as each has random states of its own."""
        if self.run_dir is None:
            return
        teacher = {"teacher": self.distiller.teacher.state_dict()} if self.distiller is not None else {}
        states = self.machine.gather({**checkpoint.random_state(self.machine.device), **teacher})
        if not self.machine.main:
            return
        state = {
            "model": _plain(self.model),
            "ema": _plain(self.ema.model) if self.ema is not None else None,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "teacher_ema": _plain(self.teacher.model) if self.teacher is not None else None,
            "teacher_updates": self.teacher.updates if self.teacher is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.machine.scaler_state(),
            "distiller": self.distiller.state_dict() if self.distiller is not None else None,
            "random": states,
            "config": self.config.to_dict(),
            "initial_weights": self.initial_weights,
            **{k: getattr(self, k) for k in _COUNTERS},
        }
        checkpoint.save(state, self.run_dir / checkpoint.LAST)

    def _resume(self) -> None:
        assert self.run_dir is not None  # TrainConfig demands one for resume
        path = self.run_dir / checkpoint.LAST
        state = checkpoint.load(path)
        checkpoint.check_same_run(state, self.config, path)
        if len(state["random"]) != self.machine.processes:
            raise ValueError(f"{path} was written by {len(state['random'])} processes, these are {self.machine.processes}")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"], state["ema_updates"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher_ema"], state["teacher_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.machine.load_scaler_state(state["scaler"])
        if self.distiller is not None:
            self.distiller.load_state_dict(state["distiller"])
        self.initial_weights = state["initial_weights"]
        for key in _COUNTERS:
            setattr(self, key, state[key])
        own = state["random"][self.machine.rank]
        checkpoint.set_random_state(own, self.machine.device)
        if self.distiller is not None:
            self.distiller.teacher.load_state_dict(own["teacher"])

    def _result(self) -> TrainResult:
        last = self.history[-1]
        return TrainResult(
            map=last.get("bbox/AP"),
            map50=last.get("bbox/AP50"),
            best_map=self.best,
            parameters=sum(p.numel() for p in self.model.parameters()),
            steps=self.step,
            step_ms=1e3 * median(self.step_times),
            train_seconds=self.seconds,
            initial_weights=self.initial_weights,
            data_order=self.data_order,
            learning_rate=self.config.peak_rate,
            inherited=self.inherited.copied if self.inherited else 0,
            history=self.history,
            run_dir=self.run_dir,
        )


_COUNTERS = ("step", "data_order", "history", "step_times", "seconds", "best", "sums", "counts", "bad_steps")


def _record(numbers: dict[str, float], factor: float, distils: bool) -> dict[str, Any]:
    """The losses of a step with their sums: "loss" of the task, "kd" of the distillation as it entered, and the ratio of the two."""
    record: dict[str, Any] = {"loss": sum(v for k, v in numbers.items() if k.startswith("loss/")), **numbers}
    if distils:
        record["kd"] = factor * sum(v for k, v in numbers.items() if k.startswith("kd/") and "/" not in k[3:])
        record["kd_ratio"] = record["kd"] / record["loss"] if record["loss"] else math.nan
    return record


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU, as contiguous tensors of their own."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}
