"""`kdkernels train` and `kdkernels distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from . import options as o
from .console import console, main_process, note
from .errors import guarded, need


@guarded
def train(
    data: o.DataDir = None,
    val_data: o.ValData = None,
    format: o.FormatOption = None,
    mapping: o.MappingOption = None,
    skip_bad: o.SkipBad = None,
    detector: o.DetectorOption = None,
    backbone: o.Backbone = None,
    size: o.Size = None,
    pretrained: o.Pretrained = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    batch_size: o.BatchSize = None,
    lr: o.Rate = None,
    ema: o.EmaDecay = None,
    precision: o.PrecisionOption = None,
    seed: o.Seed = None,
    workers: o.Workers = None,
    device: o.DeviceOption = None,
    output: o.Output = None,
    resume: o.Resume = None,
    config: o.Config = None,
    set_: o.Set = None,
    print_config: o.PrintConfig = False,
) -> None:
    """Train a detector without distillation: a teacher, or a baseline.

    kdkernels train --data DIR --backbone efficientnet-lite2 --size 160x512 --epochs 12 --output runs/teacher

    On several GPUs: torchrun --nproc-per-node N -m kdkernels train ...
    """
    _command("train", dict(locals()))


@guarded
def distill(
    data: o.DataDir = None,
    val_data: o.ValData = None,
    format: o.FormatOption = None,
    mapping: o.MappingOption = None,
    skip_bad: o.SkipBad = None,
    teacher: o.Teacher = None,
    teacher_weights: o.TeacherWeightsOption = None,
    self_: o.Self = None,
    method: o.Method = None,
    aid: o.Aid = None,
    mode: o.ModeOption = None,
    init_student: o.InitStudent = None,
    detector: o.DetectorOption = None,
    backbone: o.Backbone = None,
    size: o.Size = None,
    pretrained: o.Pretrained = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    batch_size: o.BatchSize = None,
    lr: o.Rate = None,
    ema: o.EmaDecay = None,
    precision: o.PrecisionOption = None,
    seed: o.Seed = None,
    workers: o.Workers = None,
    device: o.DeviceOption = None,
    output: o.Output = None,
    resume: o.Resume = None,
    config: o.Config = None,
    set_: o.Set = None,
    print_config: o.PrintConfig = False,
) -> None:
    """Train a student with the help of a teacher.

    kdkernels distill --data DIR --format kitti --teacher runs/teacher --backbone efficientnet-lite0 --epochs 12 --output runs/student

    Losses and their weights stand under losses in the YAML file: a name, its type (a method of kdkernels methods) and options.
    --print-config shows them all. Self-distillation: --self runs/earlier, or --self ema.

    On several GPUs: torchrun --nproc-per-node N -m kdkernels distill ...
    """
    _command("distill", dict(locals()))


def _command(command: str, given: dict[str, Any]) -> None:
    need("torchvision", "PIL", "pycocotools", "accelerate")
    from .settings import check, configure

    config = configure(command, given)
    if given["print_config"]:
        typer.echo(config.to_yaml(), nl=False)
        return
    check(command, config)
    from .runs import run

    found = run(config)
    if main_process():
        finish(Path(config.train.run_dir or ""), found)


def finish(folder: Path, found: dict[str, Any]) -> None:
    """The table of a run on stdout, its curves into its folder."""
    from kdkernels.report import run_table, to_rich

    console().print(to_rich(run_table(found)))
    try:
        from kdkernels.report.curves import draw_curves
    except ImportError:
        note("curves.png was not drawn: pip install 'kdkernels[report]'")
    else:
        draw_curves({folder.name: folder / "metrics.jsonl"}, folder / "curves.png")
    note(f"{folder}: best.pt, result.json, metrics.jsonl, train.log, run.yaml")
