"""`kdkernels data`: render, check and convert data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import options as o
from .console import console, note, progress
from .errors import BAD_INPUT, EXIT_CODES, UserError, checking_input, guarded, need

app = typer.Typer(help="Render, check and convert data sets.", no_args_is_help=True, epilog=EXIT_CODES)

Root = Annotated[Path, typer.Argument(help="Folder with the data.", show_default=False)]
FormatOption = Annotated[o.Format, typer.Option("--format", help=o.FORMAT_HELP)]
MappingOption = Annotated[o.Mapping, typer.Option("--mapping", help=o.MAPPING_HELP)]


@app.command(epilog=EXIT_CODES)
@guarded
def synthetic(
    out: Annotated[Path, typer.Argument(help="Folder to write training/image_2 and training/label_2 into.", show_default=False)],
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Number of images.")] = 400,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same bytes.")] = 0,
) -> None:
    """Render road scenes with cars, pedestrians and cyclists (96 x 320 pixels) in KITTI's folder layout."""
    need("PIL")
    from kdkernels.data.synthetic import render_dataset

    try:
        with progress("rendering") as report:
            render_dataset(out, images, seed, report)
    except FileExistsError as error:
        raise UserError(str(error)) from error
    note(f"{images} images of seed {seed} in {out}")


@app.command(epilog=EXIT_CODES)
@guarded
def check(root: Root, format: FormatOption = o.Format.kitti, mapping: MappingOption = o.Mapping.strict) -> None:
    """Report every problem of a data set as file:line: reason on stdout (exit code 2), then what is in it."""
    need("PIL")
    from kdkernels.data import load_dataset

    with checking_input(), progress("checking") as report:
        dataset = load_dataset(root, format.value, mapping=mapping.value, skip_bad=True, progress=report)
    for problem in dataset.problems:
        typer.echo(str(problem))
    note(f"problems: {len(dataset.problems)}; images without problems: {len(dataset)}")
    table = Table("class", "objects")
    for name, count in dataset.class_counts().items():
        table.add_row(name, str(count))
    console().print(table)
    if dataset.problems:
        raise typer.Exit(BAD_INPUT)


@app.command(epilog=EXIT_CODES)
@guarded
def convert(
    root: Root,
    out: Annotated[Path, typer.Argument(help="JSON file to write.", show_default=False)],
    format: FormatOption = o.Format.kitti,
    mapping: MappingOption = o.Mapping.strict,
    split: Annotated[o.Split, typer.Option("--split", help="Part of the seeded 8:2 split.")] = o.Split.all,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Seed of the split.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=o.SKIP_HELP)] = False,
) -> None:
    """Write a data set as COCO JSON: ids from 1, boxes xywh, DontCare and other ignored regions with iscrowd 1."""
    need("PIL")
    from kdkernels.data import load_dataset

    part = None if split is o.Split.all else split.value
    with checking_input(), progress("checking") as report:
        dataset = load_dataset(root, format.value, part, split_seed, mapping.value, skip_bad=skip_bad, progress=report)
    coco = dataset.coco()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(coco) + "\n", encoding="utf-8")
    note(f"{len(coco['images'])} images, {len(coco['annotations'])} annotations, {len(coco['categories'])} classes in {out}")
