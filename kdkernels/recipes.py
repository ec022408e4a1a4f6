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

#: The losses of the demo, and what their names mean on the command line; other methods have the values of their sources.
LOSSES: dict[str, dict[str, Any]] = {
    "gkd": {"type": "gkd", "weight": 0.1},
    "gkd-imitation": {"type": "gkd-imitation", "weight": 20.0, "spatial": True},
    "bmfi": {"type": "bmfi", "alpha": 1e-3, "mask": "area", "gamma": 0.0, "lambda_": 0.3, "temperature": 0.5},
}
#: Rows of `kdkernels compare-methods` with the demo's values; there the methods' own names have the published ones, for all alike.
TUNED = {f"{name}-recipe": entry for name, entry in LOSSES.items()}
AID_ALPHA = 0.1
#: What a method that weighs another one weighs where nothing else is said: PAD as released stands on FBKD.
WEIGHED = {"pad": "fbkd"}

#: Row of the demo -> names in `LOSSES`, and whether AID weighs them.
STUDENTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "student": ((), False),
    "student, equal time": ((), False),
    "student + BMFI": (("bmfi",), False),
    "student + GKD-BMFI": (("gkd", "bmfi"), False),
    "student + AID-BMFI": (("bmfi",), True),
}
#: Detectors whose methods take the values published for two stages.
TWO_STAGE = ("fasterrcnn",)
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
    #: False: the faster layout on the CPU that the demo is made for.
    channels_last: bool = False
    losses: dict[str, dict[str, Any]] = field(default_factory=lambda: copy.deepcopy(LOSSES))
    aid_alpha: float = AID_ALPHA

    def hash(self, *more: str) -> str:
        """SHA-256 of all values and of `more`: equal hashes mean that a finished row need not be run again."""
        return hashlib.sha256(json.dumps([asdict(self), *more], sort_keys=True).encode()).hexdigest()


DEMO = Recipe()
#: The same path in seconds, for tests: its numbers mean nothing.
QUICK = Recipe(train_images=16, val_images=6, teacher_steps=4, student_steps=3, batch_size=4, warmup_steps=1)


@dataclass(frozen=True)
class Comparison(Recipe):
    """What `kdkernels compare-methods` does: as the demo, for a teacher and a student on these backbones in each of the detectors.

    min_size, max_size: of the images in the detectors. reg_max: of the detectors whose boxes are regressed by a distribution, for the
    methods in `DISTRIBUTIONS`. timing_rounds: steps of each method that are timed.
    """

    student: str = "slim-student"
    teacher: str = "slim-teacher"
    min_size: int = 96
    max_size: int = 320
    reg_max: int = 16
    timing_rounds: int = 9

    def spec(self, detector: str, backbone: str, distribution: bool = False) -> DetectorSpec:
        """The detector on one of the two backbones."""
        return _spec(backbone, detector, self.min_size, self.max_size, {"reg_max": self.reg_max} if distribution else {})


COMPARISON = Comparison()
#: The same path in seconds, for tests: its numbers mean nothing.
COMPARISON_QUICK = Comparison(
    train_images=8, val_images=4, teacher_steps=2, student_steps=2, batch_size=2, warmup_steps=1, timing_rounds=2
)
#: For a GPU: detectors of the usual size, on the same renderings resized to twice theirs. Not measured yet.
COMPARISON_GPU = Comparison(
    train_images=4000,
    val_images=500,
    teacher_steps=6000,
    student_steps=3000,
    batch_size=16,
    learning_rate=5e-4,
    warmup_steps=300,
    student="resnet18",
    teacher="resnet50",
    min_size=192,
    max_size=640,
    channels_last=True,
)
COMPARED = ("fcos", "fasterrcnn")
#: Methods about the distribution that a box's sides are regressed by.
DISTRIBUTIONS = ("ld",)


def compared_methods() -> list[str]:
    """The methods that a comparison has rows for: all but AID, which is the other form of each, and those of `TUNED`."""
    from kdkernels.losses.catalogue import METHODS

    return sorted([*(name for name, (method, _) in METHODS.items() if not method.wraps or name in WEIGHED), *TUNED])


def method_entries(name: str, detector: str, aid: bool) -> dict[str, dict[str, Any]]:
    """The descriptions of the losses of NAME[+NAME] for a detector of this kind, each weighed by AID or not.

    Their values are the published ones, and the demo's for the names in `TUNED`.
    """
    parts = {part: TUNED.get(part, {"type": part}) for part in name.split("+")}
    return {part: expand(part, with_aid(entry) if aid else entry, detector, published=True) for part, entry in parts.items()}


def on_distributions(entry: Mapping[str, Any]) -> bool:
    """Whether a loss, or the one that it weighs, is about the distribution that a box's sides are regressed by."""
    return entry.get("type") in DISTRIBUTIONS or (isinstance(entry.get("base"), Mapping) and on_distributions(entry["base"]))


def title(name: str, entry: Mapping[str, Any]) -> str:
    """How a loss of this name is shown, so that AID and what PAD weighs are seen: "AID-bmfi", "pad (fbkd)"."""
    if entry.get("type") == "aid":
        return f"AID-{title(name, entry['base'])}"
    return f"{name} ({entry['base']['type']})" if isinstance(entry.get("base"), Mapping) else name


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
        "channels_last": recipe.channels_last,
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


def with_aid(entry: Mapping[str, Any], alpha: float = AID_ALPHA) -> dict[str, Any]:
    """The description of `entry`'s loss weighed by AID."""
    return dict(entry) if entry.get("type") == "aid" else {"type": "aid", "alpha": alpha, "base": dict(entry)}


def expand(name: str, entry: Mapping[str, Any] | None, detector: str = "fcos", published: bool = False) -> dict[str, Any]:
    """A loss description with its type and every option of it; `type` defaults to the loss's name.

    What is not given is the recipe's (`LOSSES`; not with `published`), and else of the preset that suits a student of the kind `detector`.
    Raises ValueError for an unknown type.
    """
    from kdkernels.losses.catalogue import METHODS

    given = {key: _number(value) for key, value in (entry or {}).items()}
    kind = str(given.get("type", name))
    if kind not in METHODS:
        raise ValueError(f"loss {name!r}: unknown type {kind!r}; the types are {', '.join(METHODS)}")
    method, loss = METHODS[kind]
    # The reduction is the Distiller's.
    defaults = {key: p.default for key, p in inspect.signature(loss).parameters.items() if key not in ("base", "reduction")}
    if "preset" in defaults:
        defaults["preset"] = suitable_preset(loss, detector) or defaults["preset"]
    values = {"type": kind, **defaults, **method.options, **({} if published else LOSSES.get(kind, {})), **given}
    if method.wraps:
        base = given.get("base", {"type": WEIGHED[kind]} if kind in WEIGHED else None)
        if not isinstance(base, Mapping):
            raise ValueError(f"loss {name!r}: type {kind} needs base, the description of the loss that it weighs")
        values["base"] = expand(name, base, detector, published)
    # An option that is None is the preset's: said here, so that the configuration shows what is in force.
    preset = loss.PRESETS.get(str(values.get("preset")), {})
    return {key: preset.get(key) if value is None else value for key, value in values.items()}


def suitable_preset(loss: type[DistillationLoss], detector: str) -> str | None:
    """The preset for a detector of this kind: its own, or that of one-stage or two-stage detectors; None where the loss has neither."""
    stage = "two-stage" if detector in TWO_STAGE else "one-stage"
    return next((preset for preset in (detector, stage) if preset in loss.PRESETS), None)


def build_losses(entries: Mapping[str, Mapping[str, Any] | None], detector: str = "fcos") -> dict[str, DistillationLoss]:
    """Loss modules from descriptions {name: {"type": a name of the catalogue, option: value, ...}}; see `expand`.

    Raises ValueError naming the loss for unknown types, unknown options (with the valid ones) and values that the loss refuses.
    """
    return {name: _build(name, expand(name, entry, detector)) for name, entry in entries.items()}


def _build(name: str, entry: dict[str, Any]) -> DistillationLoss:
    from kdkernels.losses.catalogue import METHODS, make_loss

    options = {key: value for key, value in entry.items() if key != "type"}
    if METHODS[entry["type"]][0].wraps:
        options["base"] = _build(name, entry["base"])
    try:
        return make_loss(entry["type"], options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name!r}: {error}") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _spec(
    backbone: str, detector: str = "fcos", min_size: int = 96, max_size: int = 320, more: Mapping[str, Any] | None = None
) -> DetectorSpec:
    from kdkernels.models import DetectorSpec

    return DetectorSpec(detector, backbone, num_classes=4, min_size=min_size, max_size=max_size, **(more or {})).resolved()
