"""`train`: from a model and data to a TrainResult."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kdkernels.data import DetectionDataset
from kdkernels.losses import DistillationLoss
from kdkernels.models import DetectorSpec

from .config import TrainConfig
from .loop import Loop
from .result import TrainResult


def train(
    model: nn.Module,
    spec: DetectorSpec | None,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    config: TrainConfig | None = None,
    teacher: nn.Module | Any = None,
    losses: Mapping[str, DistillationLoss] | None = None,
    *,
    console: bool = True,
    progress: Callable[[int, int], None] | None = None,
    evaluate: Callable[[nn.Module, DetectionDataset], dict[str, float]] | None = None,
) -> TrainResult:
    """Train a detector in place, on one process or on those of `torchrun` / `accelerate launch`.

    Args:
        model: a torchvision detector; afterwards it holds the final weights (not the average of `ema_decay`).
        spec: what `model` is made of, for model.json; needed with `config.run_dir`.
        train_set: `config.augment` gives it the standard transform when it has none.
        val_set: evaluated at the end and every `eval_every` epochs; None does not evaluate.
        teacher: a detector or a `kdkernels.Teacher`, or a list of several; none with `config.teacher_ema`. With `losses` it teaches;
            with `config.init_student` the student inherits from it, or from the first.
        losses: name -> distillation loss.
        console: write a line per epoch, and on a terminal a progress bar, to stderr.
        progress: called with (steps done, steps in all) after every step.
        evaluate: in place of COCO AP by `kdkernels.evaluation.evaluate_detector`; the result needs "bbox/AP" and "bbox/AP50".

    Raises:
        ValueError: options that do not fit together, or a checkpoint of another run.
        TrainingDiverged: losses or gradients stayed non-finite; names the terms.
        TrainingInterrupted: after Ctrl-C, once the step is done and the checkpoint written.
    """
    loop = Loop(model, spec, train_set, val_set, config or TrainConfig(), teacher, losses, console, progress, evaluate)
    try:
        return loop.run()
    finally:
        loop.close()
