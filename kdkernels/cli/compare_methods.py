"""`kdkernels compare-methods`: every method, alone and with AID, on the same detectors, data and steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Stages, console, note
from .errors import UserError, check_backend, guarded, need

if TYPE_CHECKING:
    from kdkernels.recipes import Comparison

    from .compare_plan import Plan
    from .compare_run import Comparing

RESULTS = "results.json"


@guarded
def compare_methods(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for everything. Default: runs/compare-methods.")] = None,
    detectors: Annotated[
        str | None, typer.Option("--detectors", metavar="NAME,...", help="fcos, retinanet, fasterrcnn. Default: fcos,fasterrcnn.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help="Methods, NAME+NAME for several at once, NAME-recipe for the demo's values. Default: all, and each recipe.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students of each kind, each from other weights.")] = 3,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps of a student.")] = None,
    teacher_steps: Annotated[int | None, typer.Option("--teacher-steps", min=1, help="Training steps of a teacher.")] = None,
    no_aid: Annotated[bool, typer.Option("--no-aid", help="Without the AID form of each method.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps on a few images: it runs, but the numbers mean nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again; else what is finished is kept.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: write the report of what is there.")] = False,
) -> None:
    """Compare methods: each alone and with AID, students of equal steps from equal weights, their teachers and no distillation beside them.

    Every method has the values published for the detector; gkd-recipe, gkd-imitation-recipe and bmfi-recipe have the demo's, tuned on
    the same kind of images.

    Renders the demo's images, trains a teacher for each detector, times a step of every method, and trains the students, seed by seed.
    Hours on a CPU; a stopped comparison goes on where it was. On a GPU: ResNet-18 from ResNet-50, the images resized to
    192 x 640. Writes results.json, results.md and gains.png.
    """
    need("torchvision", "PIL", "pycocotools", "accelerate", "matplotlib")
    check_backend()
    from kdkernels.recipes import COMPARED, compared_methods

    from .compare_plan import Plan
    from .compare_run import Comparing

    folder = output or Path("runs/compare-methods-quick" if quick else "runs/compare-methods")
    recipe = _recipe(quick, steps, teacher_steps)
    plan = Plan(_names("--detectors", detectors, COMPARED), _names("--methods", methods, compared_methods()), seeds, not no_aid)
    with Stages() as stages:
        if report:
            write_report(Comparing.stored(folder, stages))
        else:
            _check(plan, recipe)
            comparing = Comparing.opened(folder, recipe, plan, stages, fresh)
            try:
                comparing.run()
            finally:
                write_report(comparing)
    if quick:
        note("--quick: these numbers come from a few steps and mean nothing")
    note(f"{folder}: results.json, results.md, gains.png")


def write_report(comparing: Comparing) -> None:
    """results.json, results.md and gains.png from the rows that are there; the tables on stdout."""
    from kdkernels.report import to_rich
    from kdkernels.report.comparison import comparison_markdown, comparison_tables
    from kdkernels.report.comparison_plot import draw_gains

    from .stored_runs import write_json

    results = comparing.results()
    write_json(comparing.folder / RESULTS, results)
    (comparing.folder / "results.md").write_text(comparison_markdown(results), encoding="utf-8")
    draw_gains(results, comparing.folder / "gains.png")
    for table in comparison_tables(results):
        console().print(to_rich(table))


def _recipe(quick: bool, steps: int | None, teacher_steps: int | None) -> Comparison:
    import torch

    from kdkernels.recipes import COMPARISON, COMPARISON_GPU, COMPARISON_QUICK

    recipe = COMPARISON_QUICK if quick else COMPARISON_GPU if torch.cuda.is_available() else COMPARISON
    return dataclasses.replace(recipe, student_steps=steps or recipe.student_steps, teacher_steps=teacher_steps or recipe.teacher_steps)


def _names(option: str, text: str | None, default: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    from .config import split_names

    if text is None:
        return tuple(default)
    return tuple("+".join(split_names(option, name, "+")) for name in split_names(option, text, ","))


def _check(plan: Plan, recipe: Comparison) -> None:
    """Raises UserError for what there is none of, before anything runs."""
    from kdkernels.recipes import compared_methods

    known = compared_methods()
    for method in plan.methods:
        for name in method.split("+"):
            if name == "aid":
                without = "each method that is named has a row with it, unless --no-aid is given"
                raise UserError(f"--methods {method}: AID is not alone; {without}")
            if name not in known:
                raise UserError(f"--methods {method}: no method {name!r}; the methods are {', '.join(known)}")
    try:
        for job in plan.jobs():
            recipe.spec(job.arena.detector, recipe.student, job.arena.distribution)
            job.losses()
    except ValueError as error:
        raise UserError(str(error)) from error
