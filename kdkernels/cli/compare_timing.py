"""What a step of each method costs: some methods and the step without any in turn, round by round, so that whatever slows the machine
slows all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import nn

from kdkernels import Distiller, Teacher, recipes
from kdkernels.data import DetectionDataset
from kdkernels.distiller import inline_refusals
from kdkernels.losses import DistillationLoss
from kdkernels.recipes import Comparison
from kdkernels.report.comparison import BASELINE, label
from kdkernels.training import TrainConfig
from kdkernels.training.feed import Batch, Feed
from kdkernels.training.optimizer import make_optimizer

from .bench import measurement
from .console import Stages

#: Methods that are timed together: each holds a student, an optimiser and trained parts of its own meanwhile.
TOGETHER = 4


class TimedStep:
    """A training step of a student, with distillation or without."""

    def __init__(self, student: nn.Module, teacher: Teacher, losses: Mapping[str, DistillationLoss], config: TrainConfig, sample: Batch):
        if config.channels_last:
            # torch's stubs have this overload for tensors only.
            cast(Any, student).to(memory_format=torch.channels_last)
        self.student, self.clip = student.train(), config.clip_norm
        self.distiller = Distiller(student, teacher, losses, mode=config.mode).build(*sample) if losses else None
        extra = self.distiller.trainable.parameters() if self.distiller is not None else ()
        self.parameters = [*student.parameters(), *extra]
        self.optimizer = make_optimizer(config, self.parameters)

    def __call__(self, images: list[torch.Tensor], targets: list[dict[str, Any]]) -> None:
        losses = (self.distiller or self.student)(images, targets)
        torch.stack([value.float() for value in losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_in_groups(
    student: nn.Module,
    teacher: nn.Module,
    methods: Mapping[str, Mapping[str, Any]],
    train_set: DetectionDataset,
    recipe: Comparison,
    stages: Stages,
    title: str,
) -> Iterator[dict[str, dict[str, Any]]]:
    """`time_methods` of `TOGETHER` methods at a time, so that memory does not grow with their number and a stop costs one group."""
    names = list(methods)
    for i in range(0, len(names), TOGETHER):
        group = {name: methods[name] for name in names[i : i + TOGETHER]}
        yield time_methods(student, teacher, group, train_set, recipe, stages, f"{title}: {i + len(group)} of {len(names)}")


def time_methods(
    student: nn.Module,
    teacher: nn.Module,
    methods: Mapping[str, Mapping[str, Any]],
    train_set: DetectionDataset,
    recipe: Comparison,
    stages: Stages,
    title: str,
) -> dict[str, dict[str, Any]]:
    """Row -> its step: "ms" and "ratio", to the step without distillation in the same round, both medians; "memory_mib", the most that a
    step holds above what was there before (None where nobody counts); or "error".

    methods: row -> descriptions of its losses.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = Teacher(teacher.to(device))
    found: dict[str, dict[str, Any]] = {}
    batches = _batches(train_set, recipe.batch_size, device)
    sample = next(batches)
    steps: dict[str, TimedStep] = {}
    for name, entries in {label(BASELINE, False): {}, **methods}.items():
        try:
            losses = recipes.build_losses(entries)
            config = recipes.train_config(recipe, 1, 0, mode=mode_of(losses))
            steps[name] = TimedStep(copy.deepcopy(student).to(device), shared, losses, config, sample)
            steps[name](*sample)
        except Exception as error:  # whatever a method cannot do with this detector; its rows say it too
            failed = steps.pop(name, None)
            if failed is not None and failed.distiller is not None:
                failed.distiller.close()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with stages.stage(title) as report:
        for i in range(recipe.timing_rounds):
            batch = next(batches)
            for name, step in steps.items():
                _wait(device)
                start = time.perf_counter()
                step(*batch)
                _wait(device)
                times[name].append(time.perf_counter() - start)
            report(i + 1, recipe.timing_rounds)
    peak_bytes = measurement("memory").peak_bytes
    plain = times[label(BASELINE, False)]
    for name, step in steps.items():
        peak = peak_bytes(device, partial(step, *sample))
        found[name] = {
            "ms": 1e3 * median(times[name]),
            "ratio": median(own / base for own, base in zip(times[name], plain, strict=True)),
            "memory_mib": None if peak is None else peak / 2**20,
        }
        if step.distiller is not None:
            step.distiller.close()
    shared.close()
    return found


def mode_of(losses: Mapping[str, DistillationLoss]) -> str:
    """Inline, unless a loss refuses it."""
    return "explicit" if inline_refusals(losses) else "inline"


def _batches(train_set: DetectionDataset, size: int, device: torch.device) -> Iterator[Batch]:
    feed, epoch = Feed(train_set, size, seed=0), 0
    while True:
        for (images, targets), *_ in feed.steps(epoch):
            yield [x.to(device) for x in images], [{k: v.to(device) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
        epoch += 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
