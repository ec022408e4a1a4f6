"""From the options of `train` and `distill` to a configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .config import DEFAULT_METHODS, RUN_FILE, ModelSection, RunConfig, make_config, read_yaml
from .errors import UserError, checking_input
from .options import parse_size

#: Decay of the average that `--self ema` is taught by; train.teacher_ema sets another.
TEACHER_EMA = 0.999
#: Options of the two commands that set one key; what is not given (None) leaves the key alone.
KEYS = {
    "data": "data.root",
    "val_data": "data.val",
    "format": "data.format",
    "mapping": "data.mapping",
    "skip_bad": "data.skip_bad",
    "detector": "model.detector",
    "backbone": "model.backbone",
    "pretrained": "model.pretrained",
    "teacher": "teacher",
    "teacher_weights": "train.teacher_weights",
    "mode": "train.mode",
    "init_student": "train.init_student",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "lr": "train.learning_rate",
    "ema": "train.ema_decay",
    "precision": "train.mixed_precision",
    "seed": "train.seed",
    "workers": "train.workers",
    "device": "train.device",
    "output": "train.run_dir",
    "resume": "train.resume",
}


def configure(command: str, given: dict[str, Any]) -> RunConfig:
    """The configuration that the options of a command describe; a resumed run's comes from its folder."""
    flags = {key: _plain(given.get(option)) for option, key in KEYS.items()}
    flags["model.min_size"], flags["model.max_size"] = parse_size(given.get("size"))
    if given.get("self_") is not None:
        flags |= _self_taught(given, flags)
    folder = Path(given["output"] or f"runs/{command}")
    saved = folder / RUN_FILE if given.get("resume") else None
    if saved is not None and not saved.is_file():
        raise UserError(f"there is nothing to resume: no {saved}")
    file = read_yaml(given["config"]) if given["config"] is not None else {}
    if saved is not None and given["config"] is None:
        file = read_yaml(saved)
    train = file.get("train")
    if given["output"] is None and not (isinstance(train, dict) and train.get("run_dir")):
        flags["train.run_dir"] = str(folder)
    methods = given.get("method")
    if command == "distill" and methods is None and not file.get("losses"):
        methods = DEFAULT_METHODS
    config = make_config(file, flags, given["set_"] or (), methods, bool(given.get("aid")))
    if given.get("teacher_weights") is not None and len(config.teachers) < 2:
        raise UserError("--teacher-weights is about several teachers: give --teacher more than once, or leave it out")
    if saved is not None:
        _check_same(make_config(read_yaml(saved), {}), config, saved)
    return config


def check(command: str, config: RunConfig) -> None:
    """What is missing or too much, said before any data is read."""
    if config.data.root is None:
        raise UserError("there is no data: give --data DIR (or data.root in the configuration)")
    if command == "train" and config.losses:
        raise UserError("the configuration has losses: use kdkernels distill, or --set 'losses={}' for the run without them")
    if command == "distill" and config.teacher is None and not config.train.teacher_ema:
        raise UserError("there is no teacher: give --teacher with a run folder or checkpoint (kdkernels train makes one), or --self")
    if config.teacher is not None and config.train.teacher_ema:
        raise UserError("the student's average is its teacher (train.teacher_ema), so there can be no other: leave out --teacher")
    if config.train.init_student and config.train.teacher_ema:
        raise UserError("--init-student copies from the teacher, and with --self ema the student is its own: leave it out")
    if command == "distill" and not config.losses:
        raise UserError("there are no losses: give --method, or losses in the configuration")


def _self_taught(given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """What `--self` means: an average of the student as its teacher, or an earlier checkpoint, whose architecture the student has."""
    if given.get("teacher"):
        raise UserError("--self and --teacher exclude each other: with --self the student's own kind teaches it")
    if given["self_"] == "ema":
        return {"train.teacher_ema": TEACHER_EMA}
    from kdkernels.models import read_spec

    with checking_input():
        spec = read_spec(given["self_"])[0].to_dict()
    wanted = {f"model.{f.name}": spec[f.name] for f in dataclasses.fields(ModelSection)}
    other = [key for key, value in wanted.items() if flags.get(key) not in (None, value)]
    if other:
        named = ", ".join(f"{key} {flags[key]} for {wanted[key]}" for key in other)
        raise UserError(f"--self {given['self_']}: the student has the architecture of the checkpoint, not {named}")
    return {**wanted, "teacher": given["self_"]}


def _check_same(then: RunConfig, now: RunConfig, path: Path) -> None:
    """A resumed run has the data, model, teacher and losses that it began with; the trainer checks its own values."""
    for key in ("data", "model", "teacher", "losses"):
        before, after = getattr(then, key), getattr(now, key)
        if before != after:
            raise UserError(f"--resume continues the run of {path}; {key} was {_brief(before)}, is {_brief(after)}")


def _brief(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return str(value[0]) if len(value) == 1 else [str(path) for path in value] or None
    return getattr(value, "value", value)
