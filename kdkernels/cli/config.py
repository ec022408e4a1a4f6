"""The configuration of a run: YAML file, flags and `--set`, in this order, with every key checked."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdkernels import recipes
from kdkernels.training.config import TrainConfig

from .errors import UserError

#: The whole configuration in a run folder (config.yaml beside it is the part that the trainer wrote).
RUN_FILE = "run.yaml"

DEFAULT_METHODS = "gkd+bmfi"


@dataclass
class DataSection:
    """root: folder of the data. val: folder of the validation data, or None for an 8:2 split of `root` by `split_seed`.

    size: deliver images with a shorter side of this many pixels (they take less memory), or None for as they are; evaluation is in
    those pixels. format, mapping, skip_bad: see `kdkernels.data.load_dataset`.
    """

    root: str | None = None
    val: str | None = None
    format: str = "kitti"
    mapping: str = "strict"
    split_seed: int = 0
    size: int | None = None
    skip_bad: bool = False


@dataclass
class ModelSection:
    """`kdkernels.models.DetectorSpec` without num_classes, which the data has. None is what suits the detector, the data or the teacher."""

    detector: str | None = None
    backbone: str = "slim-student"
    min_size: int | None = None
    max_size: int | None = None
    pretrained: bool | None = None
    neck_channels: int | None = None
    neck_norm: bool | None = None
    head_convs: int | None = None
    levels: int | None = None
    anchor_scale: float | None = None
    proposals: int | None = None
    rois: int | None = None
    score_thresh: float | None = None
    nms_thresh: float | None = None
    detections: int | None = None
    reg_max: int | None = None


@dataclass
class RunConfig:
    """Everything about a run.

    losses: name -> description as `kdkernels.recipes.build_losses` takes it. teacher: a run folder or checkpoint, or several.
    """

    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    teacher: str | list[str] | None = None
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def teachers(self) -> list[str]:
        """All of them."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher or []

    def to_yaml(self) -> str:
        """YAML that `--config` reads back to the same configuration."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (RUN_FILE + ".tmp")
        temporary.write_text(self.to_yaml(), encoding="utf-8")
        os.replace(temporary, folder / RUN_FILE)


SECTIONS = {"data": DataSection, "model": ModelSection, "train": TrainConfig}
KEYS = tuple(f.name for f in dataclasses.fields(RunConfig))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError with the path and the place."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"{path} should hold keys and values, holds a {type(values).__name__}")
    return values or {}


def make_config(
    file: Mapping[str, Any], flags: Mapping[str, Any], sets: Sequence[str] = (), methods: str | None = None, aid: bool = False
) -> RunConfig:
    """The configuration from what a file holds, flags ({"train.epochs": 3}; None is "not given") and `--set` texts.

    methods: names of methods joined by +, in place of the file's losses. aid: weigh every loss by AID.
    Raises UserError for unknown keys and wrong values.
    """
    values = copy.deepcopy(dict(file))
    if methods is not None:
        values["losses"] = {name: {} for name in split_names("--method", methods, "+")}
    for key, value in flags.items():
        if value is not None:
            _put(values, key, value)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {text}: write KEY=VALUE, such as train.weight_decay=0")
        try:
            _put(values, key.strip(), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: the value is not YAML: {error}") from error
    return _typed(values, aid)


def split_names(option: str, text: str, separator: str) -> list[str]:
    """The names in the text of an option. Raises UserError for an empty one and for one that stands there twice."""
    names = [name.strip() for name in text.split(separator)]
    if "" in names:
        raise UserError(f"{option} {text!r}: names are joined by {separator}, and one is empty")
    repeated = dict.fromkeys(name for name in names if names.count(name) > 1)
    if repeated:
        raise UserError(f"{option} {text!r}: {', '.join(repeated)} stands there more than once")
    return names


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set "a.b.c" in nested dictionaries, making those on the way."""
    *parents, last = key.split(".")
    place = values
    for i, name in enumerate(parents):
        if not isinstance(place.get(name), dict):
            if place.get(name) is not None:
                raise UserError(f"{key}: {'.'.join(parents[: i + 1])} is a value and has no keys")
            place[name] = {}
        place = place[name]
    place[last] = value


def _losses(values: Mapping[str, Any], aid: bool, detector: str) -> dict[str, dict[str, Any]]:
    """The descriptions of the losses with every option that is in force for a student of this kind."""
    losses = values.get("losses") or {}
    if not isinstance(losses, dict):
        raise UserError(f"losses should be name: options, is {losses!r}")
    found = {}
    for key, entry in losses.items():
        if not isinstance(entry, dict | None):
            raise UserError(f"losses.{key} should be option: value, is {entry!r}")
        name, options = str(key), {"type": str(key), **(entry or {})}
        try:
            found[name] = recipes.expand(name, recipes.with_aid(options) if aid else options, detector)
            # What the loss itself refuses is said here, before anything is printed or loaded.
            recipes.build_losses({name: found[name]}, detector)
        except ValueError as error:
            raise UserError(f"{error}{_hint(name, options)}") from error
    return found


def _hint(name: str, options: Mapping[str, Any]) -> str:
    """What a description that is no loss may have been meant to be."""
    if "," in name:
        return f"; several methods are joined by +: --method {name.replace(',', '+')}"
    return "; to weigh every method by AID, name the methods and give --aid" if options["type"] == "aid" and "base" not in options else ""


def _detector(model: ModelSection, teachers: list[str]) -> str:
    """The kind of the student, as far as it can be known before anything is loaded: as `runs.make_spec` chooses it."""
    if model.detector is not None or not teachers:
        return model.detector or "fcos"
    from kdkernels.models import read_spec

    try:
        return read_spec(teachers[0])[0].detector
    except (OSError, ValueError):  # said where the teacher is loaded
        return "fcos"


def _typed(values: dict[str, Any], aid: bool) -> RunConfig:
    _check_keys("", values, KEYS)
    parts: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        given = values.get(name) or {}
        if not isinstance(given, dict):
            raise UserError(f"{name} should be key: value, is {given!r}")
        valid = tuple(f.name for f in dataclasses.fields(section))
        _check_keys(name, given, valid)
        try:
            parts[name] = section(**{key: _plain(section, f"{name}.{key}", key, value) for key, value in given.items()})
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    given = values.get("teacher")
    config = RunConfig(**parts, teacher=list(map(str, given)) if isinstance(given, list) else None if given is None else str(given))
    if values.get("losses"):
        config.losses = _losses(values, aid, _detector(config.model, config.teachers))
    return config


def _check_keys(section: str, given: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in given:
        if key in valid:
            continue
        name = f"{section}.{key}" if section else str(key)
        homes = [f"{s}.{key}" for s, kind in SECTIONS.items() if key in {f.name for f in dataclasses.fields(kind)}]
        hint = f"did you mean {' or '.join(homes)}?" if homes else f"valid are {', '.join(valid)}"
        raise UserError(f"unknown key {name}; {hint}")


def _plain(section: type, where: str, key: str, value: Any) -> Any:
    """The value in the type that the section declares (its annotations are text such as "int | None")."""
    if section is TrainConfig:  # it checks its own
        return value
    hint = next(f.type for f in dataclasses.fields(section) if f.name == key)
    kinds = [kind.strip() for kind in str(hint).split("|")]
    if value is None and "None" in kinds:
        return None
    if "bool" in kinds and isinstance(value, bool):
        return value
    if "str" in kinds and isinstance(value, str | int | float | Path) and not isinstance(value, bool):
        return str(value)
    if "int" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    if "float" in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise UserError(f"{where} is {value!r}, should be {' or '.join('nothing' if kind == 'None' else kind for kind in kinds)}")
