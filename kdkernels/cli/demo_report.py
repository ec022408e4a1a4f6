"""What stands beside the demo's results.json: table, pictures, page."""

from __future__ import annotations

import json
from typing import Any, cast

from kdkernels import BMFILoss, recipes
from kdkernels.models import load_detector
from kdkernels.recipes import STUDENTS, TEACHER, TIMED_BY
from kdkernels.report import demo_table, to_markdown
from kdkernels.report.curves import draw_curves
from kdkernels.report.page import write_page
from kdkernels.report.pictures import busiest, draw_bmfi_masks, draw_detections, draw_gkd_maps

from .demo_run import DemoRun

#: Validation images in the pictures.
DETECTIONS, MAPS = 6, 3


def write_report(run: DemoRun, results: dict[str, Any]) -> None:
    """results.md, report.html and pictures/ for the first seed of a demo."""
    folder, seed, val = run.folder / "pictures", run.seeds[0], run.val_set
    teacher = load_detector(run.path(TEACHER))[0]
    students = {name: load_detector(run.path(name, seed))[0] for name in ("student", TIMED_BY)}
    models = {"teacher": teacher, **students}
    shown = busiest(val, max(DETECTIONS, MAPS))
    bmfi = cast(BMFILoss, recipes.demo_losses("student + BMFI", run.recipe)["bmfi"])
    # Detections first: drawing maps freezes the models.
    pictures = {
        "Detections (score over 0.3; ground truth dotted)": draw_detections(models, val, shown[:DETECTIONS], folder / "detections.png"),
        "GKD maps: where the detection loss of each model looks": draw_gkd_maps(models, val, shown[:MAPS], folder / "gkd_maps.png"),
        "BMFI masks": draw_bmfi_masks(bmfi, teacher, val, shown[:MAPS], folder / "bmfi_masks.png"),
        "Training curves of the first seed": draw_curves(
            {name: run.path(name, seed) / "metrics.jsonl" for name in STUDENTS}, folder / "curves.png"
        ),
    }
    table = demo_table(results)
    (run.folder / "results.md").write_text(to_markdown(table), encoding="utf-8")
    details = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=2)
    write_page(run.folder / "report.html", "A detector distilled by GKD, BMFI and AID", table, pictures, details)
