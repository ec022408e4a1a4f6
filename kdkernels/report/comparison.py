"""The tables of `kdkernels compare-methods`, from its results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from kdkernels.recipes import TUNED, WEIGHED

from .tables import Table, to_markdown, with_deviation

Row = Mapping[str, Any]
#: The method of the students that nobody teaches.
BASELINE = ""
HURTS = "hurts"


@dataclass
class Group:
    """The finished runs of a method in one of its forms; gains are against the student of the same seed without distillation."""

    name: str
    rows: list[Row]
    gains: dict[int, float]
    over_plain: list[float]  # of AID: against the method without it
    step: Mapping[str, Any]

    @property
    def gain(self) -> float | None:
        return mean(self.gains.values()) if self.gains else None

    @property
    def hurts(self) -> bool:
        """Whether the gain is below 0 by more than its deviation, which a single seed does not have."""
        return len(self.gains) > 1 and mean(self.gains.values()) < -stdev(self.gains.values())


def label(method: str, aid: bool) -> str:
    """The name of a row; a method that weighs another one says which."""
    if method == BASELINE:
        return "no distillation"
    name = "+".join(f"{part} ({WEIGHED[part]})" if part in WEIGHED else part for part in method.split("+"))
    return f"{name} + AID" if aid else name


def groups(results: Mapping[str, Any], arena: str) -> list[Group]:
    """The methods of an arena with at least one finished run, the largest gain first."""
    found: dict[tuple[str, bool], dict[int, Row]] = {}
    for row in results["rows"]:
        if row["arena"] == arena and "map" in row:
            found.setdefault((row["method"], row["aid"]), {})[row["seed"]] = row
    plain, steps = found.get((BASELINE, False), {}), results["timing"].get(arena, {})
    made = []
    for (method, aid), rows in found.items():
        name, without = label(method, aid), found.get((method, False), {}) if aid else {}
        gains = {seed: 100 * (row["map"] - plain[seed]["map"]) for seed, row in rows.items() if method and seed in plain}
        over = [100 * (row["map"] - without[seed]["map"]) for seed, row in rows.items() if seed in without]
        made.append(Group(name, list(rows.values()), gains, over, steps.get(name, {})))
    return sorted(
        made, key=lambda group: -(group.gain if group.gain is not None else 1e9 if group.name == label(BASELINE, False) else -1e9)
    )


def comparison_tables(results: Mapping[str, Any]) -> list[Table]:
    """A table for each arena."""
    arenas = dict.fromkeys([*results["teachers"], *(row["arena"] for row in (*results["rows"], *results["missing"]))])
    return [_table(results, arena) for arena in arenas]


def _table(results: Mapping[str, Any], arena: str) -> Table:
    columns = ["", "seeds", "mAP", "gain", "each seed", "", "AID adds", "mAP50", "step", "MiB", "kd", "task loss"]
    rows = []
    teacher = results["teachers"].get(arena)
    if teacher is not None and "map" in teacher:
        rows.append(["teacher", "1", f"{100 * teacher['map']:.1f}", *[""] * 4, f"{100 * teacher['map50']:.1f}", *[""] * 4])
    for group in groups(results, arena):
        kd = [row["kd"] for row in group.rows if row["kd"] is not None]
        task = [row["task_loss"] for row in group.rows if row["task_loss"] is not None]
        memory = group.step.get("memory_mib")
        rows.append(
            [
                group.name,
                str(len(group.rows)),
                with_deviation([100 * row["map"] for row in group.rows]),
                with_deviation(list(group.gains.values()), sign=True) if group.gains else "",
                ", ".join(f"{gain:+.1f}" for gain in group.gains.values()),
                HURTS if group.hurts else "",
                with_deviation(group.over_plain, sign=True) if group.over_plain else "",
                f"{100 * mean(row['map50'] for row in group.rows):.1f}",
                _step(group),
                "" if memory is None else f"{memory:.0f}",
                f"{mean(kd):.3g}" if kd else "",
                f"{mean(task):.3g}" if task else "",
            ]
        )
    recipe = results["recipe"]
    title = (
        f"{arena}: {recipe['student']} from {recipe['teacher']}, {recipe['student_steps']} steps of {recipe['batch_size']} images of "
        f"{recipe['min_size']} x {recipe['max_size']} pixels, COCO AP x 100"
    )
    return Table(title, columns, rows, _notes(results, arena))


def _step(group: Group) -> str:
    """Its ratio; of the step that all are compared with its time too."""
    if "ratio" not in group.step:
        return ""
    own = f" ({group.step['ms']:.0f} ms)" if group.name == label(BASELINE, False) else ""
    return f"{group.step['ratio']:.2f}{own}"


def _notes(results: Mapping[str, Any], arena: str) -> list[str]:
    failed: dict[str, list[Row]] = {}
    missing: dict[str, list[int]] = {}
    for row in results["rows"]:
        if row["arena"] == arena and "error" in row:
            failed.setdefault(label(row["method"], row["aid"]), []).append(row)
    for row in results["missing"]:
        if row["arena"] == arena:
            missing.setdefault(label(row["method"], row["aid"]), []).append(row["seed"])
    notes = [f"{name} failed (seed {_seeds(row['seed'] for row in rows)}): {rows[0]['error']}" for name, rows in failed.items()]
    if missing:
        notes.append("Not run yet: " + "; ".join(f"{name} (seed {_seeds(seeds)})" for name, seeds in missing.items()) + ".")
    explicit = dict.fromkeys(
        label(row["method"], row["aid"])
        for row in results["rows"]
        if row["arena"] == arena and row.get("mode") == "explicit" and row["method"]
    )
    if explicit:
        notes.append(f"Computed before the backward pass instead of inside it: {', '.join(explicit)}.")
    return notes


def comparison_notes(results: Mapping[str, Any]) -> list[str]:
    """What holds for all tables."""
    start = "the teacher's neck and head, the rest random" if results["recipe"]["inherit"] else "random weights"
    commits = dict.fromkeys(
        f"{str(row['commit'])[:10]}{' with changes' if row['changed'] else ''}"
        for row in (*results["teachers"].values(), *results["rows"])
        if row["commit"] is not None
    )
    tuned = "; ".join(f"{name}: {_options(entry)}" for name, entry in TUNED.items())
    return [
        "Every method has the values published for the kind of detector, as kdkernels methods lists them; only the rows named recipe have "
        f"those that the demo uses, tuned on the same kind of images ({tuned}).",
        f"All students of a seed start from the same weights ({start}) and see the same images in the same order. gain: against the "
        f"student of the same seed without distillation, mean ± sample deviation; {HURTS}: its mean is below 0 by more than that. "
        "AID adds: against the method without AID. step: time of a training step over that of a step without distillation, median of "
        "rounds in which both take turns (in brackets the latter's own time, when it was measured last); MiB: the most that a "
        "step holds above what was there before. kd: mean of the distillation loss; task loss: of the last epoch.",
        f"{results['device']}, {results['threads']} threads, torch {results['versions']['torch']}, backend {results['backend']}"
        + (f", commit {', '.join(commits)}." if commits else "."),
    ]


def comparison_markdown(results: Mapping[str, Any]) -> str:
    """All tables and notes as Markdown."""
    parts = [to_markdown(table) for table in comparison_tables(results)]
    return "\n".join(parts) + "\n" + "\n\n".join(comparison_notes(results)) + "\n"


def _options(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items() if key != "type")


def _seeds(seeds: Any) -> str:
    return ", ".join(str(seed) for seed in seeds)
