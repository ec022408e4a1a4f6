"""`TrainConfig`: everything a run depends on besides the model, the data and the losses."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

CHOICES: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw", "sgd"),
    "schedule": (None, "cosine", "step"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "device": ("auto", "cpu"),
    "mode": ("inline", "explicit"),
    "teacher_weights": ("softmax", "argmin", "none"),
    "kd_schedule": ("constant", "linear", "cosine"),
}
AT_LEAST_ONE = ("epochs", "batch_size", "accumulation", "nonfinite_patience")
NOT_NEGATIVE = ("warmup_steps", "kd_warmup_steps", "workers", "eval_every", "weight_decay", "clip_norm", "ema_decay", "teacher_ema", "seed")


@dataclass
class TrainConfig:
    """The defaults train the slim detectors from scratch in minutes on a CPU.

    run_dir:        folder for config.yaml, model.json, metrics.jsonl, train.log, best.pt and checkpoints/; None writes nothing.
    seed:           of the data order, the augmentation and the global generators of torch, numpy and random. Not of the initial
                    weights: the model is built before.
    epochs, steps:  length of the run; `steps` (optimiser steps) wins when it is given.
    batch_size:     images a process takes at a time; an optimiser step sees batch_size x processes x accumulation images.
    optimizer:      "adamw", or "sgd" with momentum 0.9.
    learning_rate:  peak; None is 2e-3 for adamw and 1e-2 for sgd. It is not scaled by the batch size.
    schedule:       "cosine" to 1 % of the peak, or "step": x 0.1 after 8/12 and 11/12 of the run (the 1x schedule). None: cosine for
                    adamw, step for sgd.
    warmup_steps:   linear from 1/warmup_steps of the peak; at most half of the run.
    clip_norm:      the gradient's norm is clipped at this; 0 does not clip.
    mixed_precision: "no", "bf16" or "fp16" (a GPU's).
    ema_decay:      0, or the decay of an average of the weights that is then what is evaluated and saved as best.pt.
    teacher_ema:    0, or the decay of an average of the student's weights that is its teacher (self-distillation; give no other).
    freeze_batchnorm: statistics and parameters of the body's BatchNorm stay as they are; for pretrained backbones and small batches.
    init_student:   copy the teacher's neck and head into the student where shapes agree.
    augment:        give a training set without a transform the standard one (flip, contrast, brightness).
    eval_every:     evaluate every so many epochs; 0 only at the end.
    mode, levels, student_tap, teacher_tap: of the Distiller. teacher_weights: of the MultiTeacherDistiller, where there are several.
    kd_warmup_steps: the distillation losses grow linearly over these steps.
    kd_schedule:    "constant", or from 1 at the end of the warm-up to 0 at the last step.
    nonfinite_patience: stop after so many steps in a row with a loss or gradient that is not finite; such steps change no weight.
    resume:         continue from run_dir/checkpoints/last.pt; the other values must be those of the run.
    """

    run_dir: str | None = None
    seed: int = 0
    epochs: int = 12
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    schedule: str | None = None
    warmup_steps: int = 30
    clip_norm: float = 10.0
    mixed_precision: str = "no"
    device: str = "auto"
    channels_last: bool = True
    ema_decay: float = 0.0
    teacher_ema: float = 0.0
    freeze_batchnorm: bool = False
    init_student: bool = False
    augment: bool = True
    workers: int = 0
    eval_every: int = 0
    eval_batch_size: int = 8
    mode: str = "inline"
    levels: list[str] | None = None
    student_tap: str | None = None
    teacher_tap: str | None = None
    teacher_weights: str = "softmax"
    kd_warmup_steps: int = 0
    kd_schedule: str = "constant"
    nonfinite_patience: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            setattr(self, field.name, _typed(field.name, getattr(self, field.name), hints[field.name]))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, should be one of {', '.join(map(str, allowed))}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, should be at least 1")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, should not be negative")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}, should be at least 1")
        for name in ("ema_decay", "teacher_ema"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, should be less than 1")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, should be positive")
        if self.resume and self.run_dir is None:
            raise ValueError("resume needs run_dir, where the checkpoint is")

    @property
    def peak_rate(self) -> float:
        """The learning rate in use."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if self.optimizer == "adamw" else 1e-2

    @property
    def decay(self) -> str:
        """The schedule in use."""
        return self.schedule or ("cosine" if self.optimizer == "adamw" else "step")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> TrainConfig:
        """Raises ValueError on unknown keys, listing the valid ones, and on values of the wrong type."""
        valid = [f.name for f in fields(cls)]
        unknown = [k for k in values if k not in valid]
        if unknown:
            raise ValueError(f"unknown keys in {source}: {', '.join(map(str, unknown))}; valid are {', '.join(valid)}")
        return cls(**values)

    def write(self, path: Path) -> None:
        """Write the configuration as YAML."""
        import yaml

        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The defaults, then the YAML file at `path`, then `overrides`. Raises ValueError naming what is wrong and where."""
    values: dict[str, Any] = {}
    if path is not None:
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} should hold keys and values, holds {type(values).__name__}")
        TrainConfig.from_dict(values, str(path))
    return TrainConfig.from_dict({**values, **(overrides or {})})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the field's type; YAML reads 1e-3 as a string and overrides may come as text."""
    options = typing.get_args(hint) or (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in options:
            return None
    elif bool in options:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif isinstance(value, list | tuple):
        if any(typing.get_origin(o) is list for o in options):
            return [str(v) for v in value]
    elif isinstance(value, str | Path) and any(typing.get_origin(o) is list for o in options):
        return str(value).split(",")
    elif not isinstance(value, bool):
        for kind in (int, float, str):
            if kind in options:
                try:
                    number = kind(value)
                except (TypeError, ValueError):
                    continue
                if kind is not int or isinstance(value, str) or number == value:
                    return number
    wanted = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{name} is {value!r}, should be {wanted}")
