"""One Markdown page of everything that a device's result files hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kdkernels.report.tables import Table, to_markdown

from ..registry import Case
from . import scaling
from .cells import Cell, Record, cells
from .kernels import cell_table, not_measured, overview
from .origin import runs
from .speed_of_light import speed_of_light
from .steps import by_provider, setup_table, setups

#: Name of a picture -> what it shows. The files are <device label>-<name>.png.
CAPTIONS = {
    "time": "Median time by size of one pyramid, p20 to p80 as bars; dashed: the speed of light",
    "copy": "Per cent of the copy bandwidth measured in the same run; the line is the speed of light",
    "memory": "Peak memory above the inputs",
    "steps": "Where a training step's time goes",
}
NOT_MEASURED = "*Not measured yet.*\n"


def page(label: str, records: Sequence[Record], images: Sequence[str]) -> str:
    """Markdown; `images` are file names in the page's own folder."""
    found = cells(records)
    parts = [
        f"# Benchmarks: {label}\n",
        "Made by `kdkernels bench report`. Times are medians in milliseconds. A speed-up is another provider's time over the row's own: "
        "above 1 the row is faster. Only times of one run are compared.\n",
        runs(records),
        *(f"{note}\n" for note in not_measured(found, absent=True)),
        *pictures(images),
    ]
    for case in dict.fromkeys(cell.case for cell in found):
        parts += [f"## {case.name}\n", *_markdown(overview(found, case), speed_of_light(found, case))]
    for entry, of_entry in groupby(found, key=lambda cell: cell.entry):
        parts += [f"## {entry}\n", *_entry(list(of_entry))]
    if scaled := scaling.tables(records):
        parts += ["## Cost by size\n", *_markdown(*scaled)]
    for group in setups(records).values():
        parts += [f"## Step: {group[0]['pair']}\n", *_markdown(setup_table(group), by_provider(group))]
    return "\n".join(parts)


def pictures(images: Sequence[str], folder: str = "") -> list[str]:
    """Markdown of pictures that exist, in the order of `CAPTIONS`."""
    captions = {image: image.removesuffix(".png").rsplit("-", 1)[-1] for image in images}
    known = sorted((image for image in images if captions[image] in CAPTIONS), key=lambda image: list(CAPTIONS).index(captions[image]))
    return [f"![{CAPTIONS[captions[image]]}]({folder}{image})\n" for image in known]


def _entry(found: list[Cell]) -> list[str]:
    parts = []
    for case, of_case in groupby(found, key=lambda cell: cell.case):
        parts += [f"### {found[0].entry}: {case.name}\n", *_markdown(*map(cell_table, of_case))]
    return parts


def _markdown(*tables: Table | None) -> list[str]:
    return [to_markdown(table) for table in tables if table is not None]


def default_case(found: Sequence[Cell]) -> Case:
    """The usual case where it was measured, else the first that was."""
    return Case() if not found or any(cell.case == Case() for cell in found) else found[0].case
