"""`kdkernels demo`: from rendered images to a table of distilled students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Stages, console, note
from .errors import check_backend, guarded, need


@guarded
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for everything. Default: runs/demo.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many students of each kind, each from other weights.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps on a few images: it runs, but the numbers mean nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again; else what a stopped demo has finished is kept.")] = False,
) -> None:
    """Distil a small detector on rendered road scenes and compare it with the same one without: 8 to 10 minutes on 2 cores, offline.

    Renders the data, trains a teacher, then for each seed the same student without distillation, without it but for as much time as
    GKD-BMFI takes, with BMFI, with GKD and BMFI, and with AID on BMFI. Writes results.json, results.md, report.html and pictures.
    """
    need("torchvision", "PIL", "pycocotools", "accelerate", "matplotlib", "jinja2")
    check_backend()
    from kdkernels.recipes import DEMO, QUICK
    from kdkernels.report import demo_table, to_rich

    from .demo_report import write_report
    from .demo_run import DemoRun

    folder = output or Path("runs/demo-quick" if quick else "runs/demo")
    with Stages() as stages:
        run = DemoRun(folder, seeds, QUICK if quick else DEMO, stages, fresh)
        results = run.run(write_report)
    console().print(to_rich(demo_table(results)))
    if quick:
        note("--quick: these numbers come from a few steps and mean nothing")
    note(f"{folder}: results.json, results.md, report.html, pictures/")
