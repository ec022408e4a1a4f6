"""Tables from result files, for the terminal (rich) and for files (Markdown)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from kdkernels.recipes import title

#: The row that the others are compared with, seed by seed.
BASELINE = "student"
TEACHER = "teacher"


@dataclass
class Table:
    """Cells as text; all columns but the first are numbers. `notes` stand below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def demo_table(results: Mapping[str, Any]) -> Table:
    """The demo's results.json as one row a name, in the order of the file: means over the seeds with their sample deviation.

    "vs student" is the mean of the differences to the plain student of the same seed, in points of mAP; the differences themselves follow.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(row["name"], []).append(row)
    baseline = {row["seed"]: row["map"] for row in groups.get(BASELINE, [])}
    rows = []
    for name, group in groups.items():
        gains = [100 * (row["map"] - baseline[row["seed"]]) for row in group if row["seed"] in baseline]
        compared = bool(gains) and name not in (BASELINE, TEACHER)
        rows.append(
            [
                name,
                str(len(group)),
                with_deviation([100 * row["map"] for row in group]),
                with_deviation(gains, sign=True) if compared else "",
                ", ".join(f"{gain:+.1f}" for gain in gains) if compared else "",
                f"{100 * mean(row['map50'] for row in group):.1f}",
                f"{group[0]['parameters'] / 1e6:.2f} M",
                ", ".join(str(steps) for steps in dict.fromkeys(row["steps"] for row in group)),
                f"{mean(row['step_ms'] for row in group):.0f}",
                f"{mean(row['train_seconds'] for row in group):.0f}",
            ]
        )
    data = results["data"]
    start = "the teacher's neck and head" if results["inherit"] else "random weights only"
    columns = ["", "seeds", "mAP", "vs student", "per seed", "mAP50", "parameters", "steps", "ms/step", "train s"]
    title = f"{data['train_images']} training and {data['val_images']} validation images, COCO AP x 100"
    notes = [
        f"Every student of a seed starts from the same weights ({start}) and sees the same images in the same order.",
        f"Measured in {results['seconds']:.0f} s with {results['threads']} threads, torch {results['versions']['torch']}, "
        f"backend {results['backend']}.",
    ]
    return Table(title, columns, rows, notes)


def run_table(result: Mapping[str, Any]) -> Table:
    """The result.json of `train` or `distill`: the student beside its teacher."""
    columns = ["", "mAP", "mAP50", "parameters", "steps", "ms/step", "train s"]
    rows = []
    teachers = result.get("teacher") or []
    several = isinstance(teachers, list) and len(teachers) > 1
    for i, teacher in enumerate(teachers if isinstance(teachers, list) else [teachers]):
        named = f"{TEACHER} {i + 1}, {teacher['checkpoint']}" if several else TEACHER
        rows.append([named, *_ap(teacher), f"{teacher['parameters'] / 1e6:.2f} M", "", "", ""])
    cost = [str(result["steps"]), f"{result['step_ms']:.0f}", f"{result['train_seconds']:.0f}"]
    name = f"student + {', '.join(map(title, result['losses'], result['losses'].values()))}" if result["losses"] else "trained"
    rows.append([name, *_ap(result), f"{result['parameters'] / 1e6:.2f} M", *cost])
    data = result["data"]
    return Table(f"{data['train_images']} training and {data['val_images']} validation images, COCO AP x 100", columns, rows)


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """What `evaluate_detector` returns: a row for all classes and one for each."""
    names = [key.removeprefix("bbox/AP/") for key in metrics if key.startswith("bbox/AP/")]
    whole = ["all", *(_percent(metrics[f"bbox/{key}"]) for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"))]
    rows = [[name, _percent(metrics[f"bbox/AP/{name}"]), _percent(metrics[f"bbox/AP50/{name}"]), *[""] * 5] for name in names]
    return Table(title, ["class", "AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR100"], [whole, *rows])


def to_rich(table: Table, justify: Any = "right") -> Any:
    """The table for `rich.console.Console.print`; `justify`: of the columns behind the first."""
    from rich import table as rich_table
    from rich.console import Group
    from rich.text import Text

    drawn = rich_table.Table(title=Text(table.title) if table.title else None)
    for i, column in enumerate(table.columns):
        drawn.add_column(Text(column), justify=justify if i else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return Group(drawn, *map(Text, table.notes))


def to_markdown(table: Table) -> str:
    """The table as Markdown with a final newline."""
    lines = [f"**{table.title}**", ""]
    lines.append(_line(table.columns))
    lines.append(_line(["---", *["---:"] * (len(table.columns) - 1)]))
    lines += [_line(row) for row in table.rows]
    lines += [part for note in table.notes for part in ("", note)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_deviation(values: Sequence[float], sign: bool = False) -> str:
    """Their mean and, of several, the sample deviation."""
    text = f"{mean(values):+.1f}" if sign else f"{mean(values):.1f}"
    return f"{text} ± {stdev(values):.1f}" if len(values) > 1 else text


def _ap(values: Mapping[str, Any]) -> list[str]:
    return [_percent(values["map"]), _percent(values["map50"])]


def _percent(value: float | None) -> str:
    """AP x 100; a dash where there was nothing to find (-1 in COCO) or nothing was evaluated."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"
