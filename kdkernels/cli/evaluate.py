"""`kdkernels evaluate`: COCO AP of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .console import console, note, progress
from .errors import UserError, checking_input, guarded, need

if TYPE_CHECKING:
    from .config import DataSection, RunConfig


@guarded
def evaluate(
    model: Annotated[Path, typer.Argument(help="Run folder, or a checkpoint in one (best.pt, checkpoints/last.pt).", show_default=False)],
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the data. Default: the validation data of the run.")] = None,
    format: Annotated[o.Format | None, typer.Option("--format", help=f"Default: the run's. {o.FORMAT_HELP}")] = None,
    mapping: Annotated[o.Mapping | None, typer.Option("--mapping", help=f"Default: the run's. {o.MAPPING_HELP}")] = None,
    split: Annotated[
        o.Split | None, typer.Option("--split", help="Part of the data. Default: all, but never what the run was trained on.")
    ] = None,
    split_seed: Annotated[int | None, typer.Option("--split-seed", help="Seed of the split.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=o.SKIP_HELP)] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 8,
    device: Annotated[o.Device, typer.Option("--device", help="auto takes the GPU if there is one.")] = o.Device.auto,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers (AP in 0..1) to this file.")] = None,
) -> None:
    """Evaluate a detector: COCO AP (IoU .50:.95), over all and per class.

    On the run's own validation data: kdkernels evaluate runs/student

    On other data: kdkernels evaluate runs/student --data DIR --format coco --json ap.json
    """
    need("torchvision", "PIL", "pycocotools")
    import torch

    from kdkernels.evaluation import evaluate_detector

    from .runs import load_model, load_part, tell_skipped

    detector, spec, classes = load_model(model)
    config = _data_config(model)
    part = _choose_data(config.data, model, data, split)
    for key, value in {"format": format and format.value, "mapping": mapping and mapping.value, "split_seed": split_seed}.items():
        if value is not None:
            setattr(config.data, key, value)
    config.data.skip_bad = config.data.skip_bad or skip_bad
    assert config.data.root is not None  # _choose_data has set it
    with checking_input():
        dataset = load_part(config, config.data.root, part)
    tell_skipped(dataset)
    if not len(dataset):
        raise UserError(f"{config.data.root} has no image to evaluate on")
    if classes != dataset.classes:
        raise UserError(f"{model} detects {', '.join(classes)}, but the classes of the data are {', '.join(dataset.classes)}")
    place = torch.device("cuda" if device is o.Device.auto and torch.cuda.is_available() else "cpu")
    with progress("evaluating") as report:
        metrics = evaluate_detector(detector.to(place), dataset, batch_size, place, progress=report)
    found = {
        "model": str(model),
        "data": config.data.root,
        "split": part,
        "images": len(dataset),
        "hash": dataset.hash(),
        "metrics": metrics,
    }
    _show(found, spec.detector, spec.backbone)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        note(f"written: {json_file}")


def _choose_data(section: DataSection, model: Path, data: Path | None, split: o.Split | None) -> str | None:
    """Set `section.root` to the data to evaluate on; returns the part of it, None for all.

    The data that the run was split from means its validation part unless `split` asks for something else.
    """
    if data is None and section.root is None:
        raise UserError(f"{model} does not say what data it was trained on (no run.yaml): give --data DIR")
    same = data is None or (section.root is not None and data.resolve() == Path(section.root).resolve())
    default = "val" if same and section.val is None else None
    if data is not None:
        section.root = str(data)
    elif section.val is not None:
        section.root = section.val
    if split is None:
        if data is not None and default is not None:
            note(f"{data} is what the run was trained on: evaluating on its validation part (--split all takes everything)")
        return default
    return None if split is o.Split.all else split.value


def _data_config(model: Path) -> RunConfig:
    """The configuration of the run that a checkpoint belongs to, or an empty one."""
    from .config import RUN_FILE, RunConfig, make_config, read_yaml

    folders = [model] if model.is_dir() else [model.parent, model.parent.parent]
    for folder in folders:
        if (folder / RUN_FILE).is_file():
            return make_config(read_yaml(folder / RUN_FILE), {})
    return RunConfig()


def _show(found: dict[str, Any], detector: str, backbone: str) -> None:
    from kdkernels.report import metrics_table, to_rich

    console().print(to_rich(metrics_table(found["metrics"], f"{detector} on {backbone}, {found['images']} images of {found['data']}")))
