"""From a configuration to data, detectors and a finished run: what `train` and `distill` share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkernels.recipes import title

from .config import ModelSection, RunConfig
from .console import main_process, note, progress
from .errors import UserError, check_backend, checking_input

if TYPE_CHECKING:
    from torch import nn

    from kdkernels.data import DetectionDataset
    from kdkernels.models import DetectorSpec
    from kdkernels.training import TrainResult

RESULT_FILE = "result.json"


def load_data(config: RunConfig) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation data. Raises UserError with every problem of both."""
    from kdkernels.data import BadDataError

    data = config.data
    if data.root is None:
        raise UserError("there is no data: give --data DIR (or data.root in the configuration)")
    split = data.val is None
    parts, problems = [], []
    with checking_input():
        for name, root in (("train", data.root), ("val", data.val or data.root)):
            try:
                parts.append(load_part(config, root, name if split else None))
            except BadDataError as error:
                problems += [p for p in error.problems if p not in problems]
        if problems:
            raise BadDataError(problems)
    train, val = parts
    tell_skipped(train, val)
    for name, part in (("training", train), ("validation", val)):
        if not len(part):
            raise UserError(f"the {name} data has no image{' without problems' if part.problems else ''}")
    if train.classes != val.classes:
        raise UserError(f"training and validation data have different classes: {', '.join(train.classes)} / {', '.join(val.classes)}")
    return train, val


def load_part(config: RunConfig, root: str, split: str | None) -> DetectionDataset:
    """One of the data sets that a configuration describes."""
    from kdkernels.data import load_dataset

    data = config.data
    options: dict[str, Any] = {"mapping": data.mapping, "skip_bad": data.skip_bad, "size": data.size}
    with progress(f"checking the {split or 'whole'} data") as report:
        return load_dataset(root, data.format, split, data.split_seed, progress=report, **options)


def tell_skipped(*parts: DetectionDataset) -> None:
    """Say what `skip_bad` left out."""
    problems = sorted({str(problem) for part in parts for problem in part.problems})
    if problems and main_process():
        note("\n".join([f"left out, because of {len(problems)} problem{'s' if len(problems) > 1 else ''}:", *(f"  {p}" for p in problems)]))


def load_model(path: str | Path) -> tuple[nn.Module, DetectorSpec, list[str]]:
    """A detector from a run folder or checkpoint; UserError when there is none."""
    from kdkernels.models import load_detector

    with checking_input():
        return load_detector(path)


def make_spec(model: ModelSection, data: DetectionDataset, teacher: DetectorSpec | None) -> DetectorSpec:
    """The detector to train: what the configuration leaves open is taken from the teacher (kind, size) or the data (size)."""
    from kdkernels.models import DetectorSpec

    given = {key: value for key, value in dataclasses.asdict(model).items() if value is not None}
    given.setdefault("detector", teacher.detector if teacher else "fcos")
    if "min_size" not in given and "max_size" not in given:
        if teacher is not None:
            given |= {"min_size": teacher.min_size, "max_size": teacher.max_size}
        else:
            sides = [sorted((item.width, item.height)) for item in data.items]
            given |= {"min_size": max(short for short, _ in sides), "max_size": max(long for _, long in sides)}
    given.setdefault("pretrained", model.backbone.startswith("efficientnet"))
    with checking_input():
        return DetectorSpec.from_dict({**given, "num_classes": len(data.classes) + 1}).resolved()


def check_teacher(classes: list[str], data: DetectionDataset, path: str) -> None:
    """Raises UserError unless the teacher detects the data's classes."""
    if classes != data.classes:
        raise UserError(f"the teacher {path} detects {', '.join(classes)}, but the classes of the data are {', '.join(data.classes)}")


def check_distributions(config: RunConfig, teachers: list[DetectorSpec]) -> None:
    """Raises UserError unless losses on the distributions of the boxes' sides have them from both, over equally many values."""
    from kdkernels.recipes import on_distributions

    names = [name for name, entry in config.losses.items() if on_distributions(entry)]
    sizes = {"the student": config.model.reg_max, **dict(zip(config.teachers, (spec.reg_max for spec in teachers), strict=True))}
    if names and (None in sizes.values() or len(set(sizes.values())) > 1):
        found = ", ".join(f"{who} {'none' if size is None else f'reg_max {size}'}" for who, size in sizes.items())
        raise UserError(
            f"{', '.join(names)} compares the distributions by which student and teacher regress boxes, and they have: {found}; give "
            "--set model.reg_max=16 to kdkernels train for the teacher and to kdkernels distill for the student"
        )


def check_folder(folder: Path, resume: bool) -> None:
    """Raises UserError when a new run would overwrite another, or when there is none to resume."""
    last = folder / "checkpoints" / "last.pt"
    if resume and not last.is_file():
        raise UserError(f"there is nothing to resume: no {last}")
    if not resume and last.is_file():
        raise UserError(f"{folder} holds a run already: --resume continues it, --output names another folder")


def run(config: RunConfig) -> dict[str, Any]:
    """Train what a checked configuration describes; returns what is in result.json. Errors before the first step are UserErrors."""
    import torch

    from kdkernels.models import build_detector
    from kdkernels.multi_teacher import inline_refusals
    from kdkernels.recipes import build_losses

    check_backend()
    folder = Path(config.train.run_dir or "")
    check_folder(folder, config.train.resume)
    with checking_input():
        losses = build_losses(config.losses)
    if config.train.mode == "inline":
        for refusal in inline_refusals(losses, len(config.teachers)):
            raise UserError(f"{refusal}; give --mode explicit")
    loaded = [load_model(path) for path in config.teachers]
    check_distributions(config, [spec for _, spec, _ in loaded])
    train_set, val_set = load_data(config)
    for path, (_, _, classes) in zip(config.teachers, loaded, strict=True):
        check_teacher(classes, train_set, path)
    teachers = [model for model, _, _ in loaded]
    spec = make_spec(config.model, train_set, loaded[0][1] if loaded else None)
    torch.manual_seed(config.train.seed)
    with checking_input():
        model = build_detector(spec)
    if main_process():
        if not config.train.resume:
            config.write(folder)
        tell_start(config, spec, train_set, val_set)
    result = _train(model, spec, train_set, val_set, config, teachers or None, losses)
    found = describe(config, result, spec, train_set, val_set)
    if main_process():
        described = [describe_teacher(config, *pair, val_set) for pair in zip(config.teachers, teachers, strict=True)]
        if described:
            found["teacher"] = described[0] if len(described) == 1 else described
        (folder / RESULT_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _train(
    model: nn.Module,
    spec: DetectorSpec,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    config: RunConfig,
    teacher: Any,
    losses: Any,
) -> TrainResult:
    """`kdkernels.training.train`; a ValueError before the first step is about options that do not fit together."""
    from kdkernels.training import train

    started = False

    def step_done(done: int, total: int) -> None:
        nonlocal started
        started = True

    try:
        return train(model, spec, train_set, val_set, config.train, teacher, losses or None, progress=step_done)
    except (ValueError, FileNotFoundError) as error:
        if started:
            raise
        raise UserError(str(error)) from error


def describe(
    config: RunConfig, result: TrainResult, spec: DetectorSpec, train_set: DetectionDataset, val_set: DetectionDataset
) -> dict[str, Any]:
    """What result.json says about a run; AP in 0..1, times in ms and s."""
    values = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in ("history", "run_dir")}
    last = result.history[-1] if result.history else {}
    return {
        **values,
        "metrics": {key: value for key, value in last.items() if key.startswith("bbox/")},
        "detector": spec.to_dict(),
        "classes": train_set.classes,
        "data": {"train_images": len(train_set), "val_images": len(val_set), "train": train_set.hash(), "val": val_set.hash()},
        "losses": config.losses,
        "mode": config.train.mode if config.losses else None,
    }


def describe_teacher(config: RunConfig, path: str, teacher: nn.Module, val_set: DetectionDataset) -> dict[str, Any]:
    """The teacher's row beside the student's: its AP on the same images."""
    from kdkernels.evaluation import evaluate_detector

    with progress("evaluating the teacher") as report:
        metrics = evaluate_detector(teacher, val_set, config.train.eval_batch_size, progress=report)
    parameters = sum(p.numel() for p in teacher.parameters())
    return {"checkpoint": path, "map": metrics["bbox/AP"], "map50": metrics["bbox/AP50"], "parameters": parameters}


def tell_start(config: RunConfig, spec: DetectorSpec, train_set: DetectionDataset, val_set: DetectionDataset) -> None:
    """What is about to be trained on what, in two lines."""
    note(f"{len(train_set)} training and {len(val_set)} validation images, classes {', '.join(train_set.classes)}")
    what = f"{spec.detector} on {spec.backbone}, {spec.min_size} x {spec.max_size} pixels"
    teacher = "its own average" if config.train.teacher_ema else " and ".join(config.teachers)
    losses = ", ".join(map(title, config.losses, config.losses.values()))
    taught = f", taught by {teacher} with {losses} ({config.train.mode})" if losses else ""
    note(f"{what}{taught}; run folder {config.train.run_dir}")
