"""Writes what README.md and docs/ tell of benchmarks/results/: tables, docs/benchmarks/, pictures. `python -m benchmarks.report.tables`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdkernels.report.comparison import comparison_markdown
from kdkernels.report.comparison_plot import draw_gains
from kdkernels.report.tables import Table, demo_table, run_table, to_markdown

from ..codegen.native.table import page as native_codegen_page
from ..codegen.table import page as codegen_page
from ..registry import Case
from ..studies import non_local
from . import scaling
from .cells import Cell, Record, cells
from .kernels import one_case, overview
from .methods import METHODS, block
from .methods import overview as methods
from .origin import device
from .page import NOT_MEASURED, pictures
from .run import load, result_files, write
from .speed_of_light import speed_of_light
from .steps import by_provider, setup_table, setups

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
METHOD_PAGES = tuple(sorted(f"docs/methods/{path.name}" for path in (ROOT / "docs" / "methods").glob("*.md")))
PAGES = ("benchmarks", "comparison", "gkd-ablation", "methods", "non-local", "real-data")
DOCUMENTS = ("README.md", *(f"docs/{page}.md" for page in PAGES), *METHOD_PAGES)
PICTURES = ROOT / "docs" / "benchmarks"
#: results.json as `kdkernels compare-methods` writes it, and its picture.
COMPARISON = ROOT / "docs" / "comparison"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def ablation(study: str) -> str:
    """A row a name, in the script's order: mean and deviation over the seeds, and the paired difference to the plain student."""
    records = [json.loads(line) for line in (RESULTS / "gkd-ablation.jsonl").read_text().splitlines()]
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["study"] == study:
            groups.setdefault(record["name"], {})[record["seed"]] = record
    plain = {r["seed"]: r["map"] for r in records if r["study"] == ("map" if study == "aid" else study) and r["name"] == "plain"}
    columns = ["", "mAP", "each seed", "against plain", "each seed", "steps", "kd / task loss, last epoch"]
    rows = []
    for name in sorted(groups, key=order(study).index):
        runs = [groups[name][seed] for seed in sorted(groups[name])]
        maps = [100 * run["map"] for run in runs]
        gains = [100 * (run["map"] - plain[run["seed"]]) for run in runs if run["seed"] in plain and name != "plain"]
        ratios = [run["kd"]["kd_ratio"] for run in runs if run["kd"].get("kd_ratio")]
        rows.append(
            [
                name,
                spread(maps),
                ", ".join(f"{value:.1f}" for value in maps),
                f"{mean(gains):+.1f}" if gains else "",
                ", ".join(f"{value:+.1f}" for value in gains),
                ", ".join(sorted({str(run["steps"]) for run in runs})),
                f"{mean(ratios):.2g}" if ratios else "",
            ]
        )
    return to_markdown(Table("COCO AP x 100 on 150 validation images", columns, rows))


def diagnosis() -> str:
    """Medians at P3, P4, P5 on training and on validation images."""
    found = json.loads((RESULTS / "gkd-map-diagnosis.json").read_text())
    parts = {name: found[name] for name in ("training images", "validation images")}
    names = list(parts["training images"])
    cells = [[f"{level['median']:.3g}" for part in parts.values() for level in part[name]] for name in names]
    columns = ["median over images", *(f"{part.split()[0]}, {level}" for part in parts for level in ("P3", "P4", "P5"))]
    rows = [[name, *numbers] for name, numbers in zip(names, cells, strict=True)]
    return to_markdown(Table("64 images of each set, student after 150 steps", columns, rows))


def aid_weights() -> str:
    """The teacher's median loss on an image, right way up and upside down, and AID's weight there."""
    found = json.loads((RESULTS / "gkd-map-diagnosis.json").read_text())["teacher's loss an image"]
    columns = ["64 training images", *next(iter(found.values()))]
    return to_markdown(Table("Medians over images", columns, [[name, *(f"{v:.2f}" for v in row.values())] for name, row in found.items()]))


def step_cost() -> str:
    """What a step with GKD-BMFI cost when the schedules of the ablation were chosen."""
    found = json.loads((RESULTS / "inline-explicit.json").read_text())
    ratios = {"plain": 1.0, **{mode: found["median_of_paired_ratios"][f"{mode} / plain"] for mode in ("inline", "explicit")}}
    rows = [[name, f"{found['median_ms'][name]:.0f}", f"{ratio:.2f}"] for name, ratio in ratios.items()]
    title = f"A training step, {found['threads']} thread, {found['rounds']} rounds, torch {found['torch']}"
    return to_markdown(Table(title, ["", "ms", "times the plain step"], rows))


def orders_of_products() -> str:
    """A table a device."""
    files = sorted(RESULTS.parent.glob(f"*/{non_local.NAME}"))
    return "\n".join(to_markdown(non_local.table(json.loads(path.read_text()))) for path in files) or NOT_MEASURED


def order(study: str) -> list[str]:
    from ..studies.gkd_ablation import runs

    return [run.name for run in runs() if run.study == study]


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def demo() -> str:
    return to_markdown(demo_table(json.loads((RESULTS / "demo.json").read_text())))


def comparison() -> dict[str, Any]:
    return json.loads((COMPARISON / "results.json").read_text(encoding="utf-8"))


def real(name: str) -> str:
    """The runs of one real data set, in the order in which the documented commands make them."""
    entries = json.loads((RESULTS / f"real-{name}.json").read_text())
    tables = [run_table(entry) for entry in entries]
    for entry, table in zip(entries, tables, strict=True):
        table.rows[-1][0] = entry["name"]
    return to_markdown(Table(tables[0].title, tables[0].columns, [table.rows[-1] for table in tables]))


def measured() -> list[Record]:
    """The CPU's records."""
    return load(result_files(RESULTS.parent).get(RESULTS.name, []))


def kernels(table: Callable[[list[Cell]], Table | None]) -> str:
    return shown(table(cells(measured())))


def steps(table: Callable[[list[Record]], Table | None]) -> str:
    """A table a pair of detectors."""
    return "\n".join(shown(table(group)) for group in setups(measured()).values()) or NOT_MEASURED


def scaled() -> str:
    return "\n".join(map(to_markdown, scaling.tables(measured()))) or NOT_MEASURED


def shown(table: Table | None) -> str:
    return to_markdown(table) if table is not None else NOT_MEASURED


def pages() -> str:
    """A line for every device that has been measured, with a link to its page."""
    found = result_files(RESULTS.parent)
    return "".join(f"- [{label}](benchmarks/{label}.md): {device(load(paths))}\n" for label, paths in found.items()) or NOT_MEASURED


TABLES: dict[str, Callable[[], str]] = {
    "performance-cpu": lambda: kernels(lambda found: one_case(found, "gkd_bmfi", Case(), ("forward", "backward", "inline"))),
    "overview-cpu": lambda: kernels(lambda found: overview(found, Case())),
    "speed-of-light-cpu": lambda: kernels(lambda found: speed_of_light(found, Case())),
    "box-mask-cpu": lambda: kernels(lambda found: one_case(found, "box_mask", Case(boxes=100), ("forward",))),
    "feature-imitation-cpu": lambda: kernels(lambda found: one_case(found, "feature_imitation", Case(), ("forward", "backward"))),
    "scaling-cpu": scaled,
    "steps-cpu": lambda: steps(lambda group: setup_table(group, "gkd_bmfi")),
    "distillation-cpu": lambda: steps(by_provider),
    "pictures-cpu": lambda: "\n".join(pictures([path.name for path in PICTURES.glob("cpu-*.png")], "benchmarks/")) or NOT_MEASURED,
    "pages": pages,
    "demo": demo,
    "ablation-long": lambda: ablation("long"),
    "step-cost": step_cost,
    "ablation-map": lambda: ablation("map"),
    "gkd-map-diagnosis": diagnosis,
    "aid-weights": aid_weights,
    "non-local": orders_of_products,
    "ablation-aid": lambda: ablation("aid"),
    "real-kitti": lambda: real("kitti"),
    "real-coco-traffic": lambda: real("coco-traffic"),
    "methods": methods,
    "comparison": lambda: comparison_markdown(comparison()),
    **{f"method-{name}": partial(block, name) for name in METHODS},
}


def filled(text: str) -> str:
    """The document with every table block made anew."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]().strip() + "\n" + block[3], text)


def main() -> None:
    write(result_files(RESULTS.parent), PICTURES)
    for name, compiled_page in (("codegen", codegen_page), ("native-codegen", native_codegen_page)):
        compiled = json.loads((RESULTS.parent / f"{name}.json").read_text(encoding="utf-8"))
        (PICTURES / f"{name}.md").write_text(compiled_page(compiled), encoding="utf-8")
    draw_gains(comparison(), COMPARISON / "gains.png")
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
