"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainResult:
    """map, map50: COCO AP and AP50 (0..1) of the final weights (of their average with `ema_decay`); None without a validation set.
    best_map: the highest AP met; best.pt holds those weights.
    step_ms: median time of an optimiser step in ms: forward, backward and optimiser of all its batches, data loading excluded.
    train_seconds: wall time of the training loop, data loading included, evaluation and writing of checkpoints excluded.
    initial_weights: SHA-256 of the student's state before the first step. data_order: SHA-256 chain over the image ids and augmentation
    seeds of every step.
    history: a dict per epoch: step, epoch, mean losses, gradient norm and, when evaluated, every figure of the evaluation.
    """

    map: float | None
    map50: float | None
    best_map: float | None
    parameters: int
    steps: int
    step_ms: float
    train_seconds: float
    initial_weights: str
    data_order: str
    learning_rate: float
    inherited: int
    history: list[dict[str, Any]] = field(default_factory=list)
    run_dir: Path | None = None


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C came; the step was finished and, with a run folder, a checkpoint written. Continue with `resume`."""


class TrainingDiverged(RuntimeError):
    """Losses or gradients stayed non-finite for `nonfinite_patience` steps."""
