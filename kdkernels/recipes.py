"""The recipe of the demo and of the ablation: data, detectors, training and losses. Every number of it stands in this file.

The figures come from measurements on this data; docs/gkd-ablation.md has them. Importing this module needs torch and numpy only.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels.losses import DistillationLoss
    from kdkernels.models import DetectorSpec
    from kdkernels.training import TrainConfig

#: The losses of the demo, and what the command line's `--loss` names mean.
LOSSES: dict[str, dict[str, Any]] = {
    "gkd": {"type": "gkd", "weight": 0.1},
    "gkd-imitation": {"type": "gkd-imitation", "weight": 20.0, "spatial": True},
    "bmfi": {"type": "bmfi", "alpha": 1e-3, "mask": "area", "gamma": 0.0, "lambda_": 0.3, "temperature": 0.5},
}
AID_ALPHA = 0.1

#: Row of the demo -> names in `LOSSES`, and whether AID weighs them.
STUDENTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "student": ((), False),
    "student, equal time": ((), False),
    "student + BMFI": (("bmfi",), False),
    "student + GKD-BMFI": (("gkd", "bmfi"), False),
    "student + AID-BMFI": (("bmfi",), True),
}
TEACHER = "teacher"
PLAIN = "student"
EQUAL_TIME = "student, equal time"
TIMED_BY = "student + GKD-BMFI"


@dataclass(frozen=True)
class Recipe:
    """What the demo does. Images are 96 x 320 pixels; steps are optimiser steps of `batch_size` images.

    inherit: all students start with the teacher's neck and head, or (False) none does.
    """

    train_images: int = 400
    val_images: int = 150
    train_seed: int = 0
    val_seed: int = 1
    teacher_seed: int = 0
    teacher_steps: int = 600
    student_steps: int = 250
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 30
    clip_norm: float = 10.0
    inherit: bool = True
    losses: dict[str, dict[str, Any]] = field(default_factory=lambda: copy.deepcopy(LOSSES))
    aid_alpha: float = AID_ALPHA

    def hash(self, *more: str) -> str:
        """SHA-256 of all values and of `more`: equal hashes mean that a finished row need not be run again."""
        return hashlib.sha256(json.dumps([asdict(self), *more], sort_keys=True).encode()).hexdigest()


DEMO = Recipe()
#: The same path in seconds, for tests: its numbers mean nothing.
QUICK = Recipe(train_images=16, val_images=6, teacher_steps=4, student_steps=3, batch_size=4, warmup_steps=1)


def teacher_spec() -> DetectorSpec:
    """FCOS on the slim ResNet of 3.09 M parameters."""
    return _spec("slim-teacher")


def student_spec() -> DetectorSpec:
    """FCOS on the slim ResNet of 0.59 M parameters."""
    return _spec("slim-student")


def train_config(recipe: Recipe, steps: int, seed: int, **more: Any) -> TrainConfig:
    """The training of teacher and students alike; `more` overrides (run_dir, resume, init_student, ...)."""
    from kdkernels.training import TrainConfig

    values = {
        "steps": steps,
        "seed": seed,
        "batch_size": recipe.batch_size,
        "optimizer": "adamw",
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "schedule": "cosine",
        "warmup_steps": recipe.warmup_steps,
        "clip_norm": recipe.clip_norm,
        # The faster layout on the CPU that the demo is made for.
        "channels_last": False,
    }
    return TrainConfig(**{**values, **more})


def demo_losses(name: str, recipe: Recipe = DEMO) -> dict[str, DistillationLoss]:
    """New loss modules for a row of the demo ("student + BMFI", ...); empty for the rows without distillation."""
    return build_losses(row_entries(name, recipe))


def row_entries(name: str, recipe: Recipe = DEMO) -> dict[str, dict[str, Any]]:
    """The descriptions of the losses of a row of the demo, as `build_losses` takes them."""
    if name not in STUDENTS:
        raise ValueError(f"no row {name!r}; the rows are {', '.join(map(repr, STUDENTS))}")
    parts, adaptive = STUDENTS[name]
    entries = {part: recipe.losses[part] for part in parts}
    return {part: with_aid(entry, recipe.aid_alpha) for part, entry in entries.items()} if adaptive else entries


def with_aid(entry: dict[str, Any], alpha: float = AID_ALPHA) -> dict[str, Any]:
    """The description of `entry`'s loss weighed by AID."""
    return entry if entry.get("type") == "aid" else {"type": "aid", "alpha": alpha, "base": entry}


def expand(name: str, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """A loss description with its type and the recipe's options where none are given; `type` defaults to the loss's name.

    Raises ValueError for an unknown type.
    """
    given = {key: _number(value) for key, value in (entry or {}).items()}
    kind = given.get("type", name)
    if kind == "aid":
        if not isinstance(given.get("base"), Mapping):
            raise ValueError(f"loss {name!r}: type aid needs base, the description of the loss that it weighs")
        return {"type": "aid", "alpha": AID_ALPHA, **given, "base": expand(name, given["base"])}
    if kind not in LOSSES:
        raise ValueError(f"loss {name!r}: unknown type {kind!r}; the types are {', '.join(LOSSES)}, aid")
    return {**LOSSES[kind], **given, "type": kind}


def build_losses(entries: Mapping[str, Mapping[str, Any] | None]) -> dict[str, DistillationLoss]:
    """Loss modules from descriptions {name: {"type": "gkd" | "gkd-imitation" | "bmfi" | "aid", option: value, ...}}.

    Raises ValueError naming the loss for unknown types, unknown options (with the valid ones) and values that the loss refuses.
    """
    return {name: _build(name, expand(name, entry)) for name, entry in entries.items()}


def _build(name: str, entry: dict[str, Any]) -> DistillationLoss:
    from kdkernels.losses import AIDLoss, BMFILoss, GKDLoss

    options = {key: value for key, value in entry.items() if key != "type"}
    kind: type[DistillationLoss] = {"bmfi": BMFILoss, "aid": AIDLoss}.get(entry["type"], GKDLoss)
    valid = [key for key in inspect.signature(kind).parameters if key not in ("reduction", "form")]
    unknown = [key for key in options if key not in valid]
    if unknown:
        raise ValueError(f"loss {name!r}: unknown options {', '.join(unknown)}; {entry['type']} has {', '.join(valid)}")
    if entry["type"] == "aid":
        options["base"] = _build(name, entry["base"])
    if kind is GKDLoss:
        options["form"] = "imitation" if entry["type"] == "gkd-imitation" else "map"
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name!r}: {error}") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _spec(backbone: str) -> DetectorSpec:
    from kdkernels.models import DetectorSpec

    return DetectorSpec(detector="fcos", backbone=backbone, num_classes=4, min_size=96, max_size=320).resolved()
