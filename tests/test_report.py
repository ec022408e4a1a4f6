"""Tables, curves and pictures."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kdkernels import BMFILoss, functional
from kdkernels.data import DetectionDataset, load_dataset
from kdkernels.data.synthetic import render_dataset
from kdkernels.models import DetectorSpec, build_detector
from kdkernels.report import Table, demo_table, metrics_table, run_table, to_markdown, to_rich


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return load_dataset(render_dataset(tmp_path_factory.mktemp("report") / "road", 4, seed=2))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_detector(DetectorSpec()).eval()


def results(**maps: list[float]) -> dict[str, Any]:
    """A results.json with the given AP by name, a value for each seed."""
    cost = {"parameters": 500_000, "step_ms": 100.0, "train_seconds": 30.0}
    rows = [
        {"name": name.replace("_", " "), "seed": seed, "map": ap, "map50": 2 * ap, "steps": 300 + seed, **cost}
        for name, values in maps.items()
        for seed, ap in enumerate(values)
    ]
    data = {"train_images": 400, "val_images": 150}
    how = {"inherit": False, "seconds": 500.0, "threads": 2, "backend": "native", "versions": {"torch": "2.11"}}
    return {"data": data, "rows": rows, **how}


def test_the_demos_table_has_means_deviations_and_differences_per_seed() -> None:
    table = demo_table(results(teacher=[0.4], student=[0.20, 0.10], student_distilled=[0.26, 0.18]))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["teacher"]["mAP"] == "40.0" and rows["teacher"]["vs student"] == ""
    assert rows["student"]["mAP"] == "15.0 ± 7.1" and rows["student"]["vs student"] == ""
    distilled = rows["student distilled"]
    assert (distilled["mAP"], distilled["vs student"], distilled["per seed"]) == ("22.0 ± 5.7", "+7.0 ± 1.4", "+6.0, +8.0")
    assert (distilled["mAP50"], distilled["steps"], distilled["parameters"]) == ("44.0", "300, 301", "0.50 M")


def test_one_seed_has_no_deviation_and_losses_are_shown() -> None:
    table = demo_table(results(student=[0.2], student_distilled=[0.15]))
    assert table.rows[1][table.columns.index("vs student")] == "-5.0"
    assert table.rows[0][table.columns.index("mAP")] == "20.0"


def test_markdown_and_terminal_show_every_cell() -> None:
    from rich.console import Console

    table = Table("title [1]", ["", "a|b"], [["row [x]", "1.0"]], ["a note"])
    assert to_markdown(table) == "**title [1]**\n\n|  | a\\|b |\n| --- | ---: |\n| row [x] | 1.0 |\n\na note\n"
    out = StringIO()
    Console(file=out, width=80).print(to_rich(table))
    assert all(text in out.getvalue() for text in ("title [1]", "a|b", "row [x]", "1.0", "a note"))


def test_a_run_is_shown_beside_its_teacher_and_without_validation_as_a_dash() -> None:
    data, losses = {"train_images": 3, "val_images": 2}, {"gkd": {}, "bmfi": {}}
    cost = {"parameters": 10**6, "steps": 5, "step_ms": 12.4, "train_seconds": 3.0}
    run = {"map": 0.1, "map50": None, "losses": losses, "data": data, **cost}
    table = run_table({**run, "teacher": {"map": 0.5, "map50": 0.75, "parameters": 3_000_000}})
    assert table.rows == [["teacher", "50.0", "75.0", "3.00 M", "", "", ""], ["student + gkd, bmfi", "10.0", "-", "1.00 M", "5", "12", "3"]]
    assert run_table({**run, "losses": {}}).rows[0][0] == "trained"
    pad = {"type": "pad", "base": {"type": "fbkd"}}
    weighed = {"bmfi": {"type": "aid", "base": {"type": "bmfi"}}, "pad": pad, "both": {"type": "aid", "base": pad}}
    teachers = [{"checkpoint": f"runs/{name}", "map": 0.5, "map50": 0.75, "parameters": 3_000_000} for name in "ab"]
    table = run_table({**run, "losses": weighed, "teacher": teachers})
    assert [row[0] for row in table.rows] == ["teacher 1, runs/a", "teacher 2, runs/b", "student + AID-bmfi, pad (fbkd), AID-both (fbkd)"]


def test_metrics_have_a_row_per_class_and_a_dash_where_there_was_nothing_to_find() -> None:
    metrics = {
        f"bbox/{k}": v
        for k, v in zip(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), (0.5, 0.6, 0.4, 0.1, 0.2, -1, 0.3), strict=True)
    }
    table = metrics_table({**metrics, "bbox/AP/Car": 0.5, "bbox/AP50/Car": 0.25}, "t")
    assert table.rows == [["all", "50.0", "60.0", "40.0", "10.0", "20.0", "-", "30.0"], ["Car", "50.0", "25.0", *[""] * 5]]


def test_curves_are_smoothed_over_finite_values_and_drawn(tmp_path: Path) -> None:
    from kdkernels.report.curves import draw_curves, read_metrics, smooth

    assert smooth([1.0, 3.0, math.nan, 5.0], share=0.5) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(smooth([math.inf, 1.0], share=0.1)[0])
    lines = [{"step": i, "loss": 2.0 / i, "kd_ratio": "nan" if i == 2 else 0.5, "grad_norm": 1.0, "memory_mib": None} for i in (1, 2, 3)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    records = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(records[1]["kd_ratio"]) and "memory_mib" not in records[0]
    with Image.open(draw_curves({"a run": tmp_path / "m.jsonl"}, tmp_path / "sub" / "c.png")) as picture:
        assert picture.width > 1000


def test_the_images_with_most_objects_are_shown(data: DetectionDataset) -> None:
    from kdkernels.report.pictures import busiest

    counts = [len(data.target(i)["boxes"]) for i in busiest(data, 4)]
    assert counts == sorted(counts, reverse=True) and len(busiest(data, 2)) == 2


def test_gkd_maps_are_those_of_the_loss(data: DetectionDataset, model: torch.nn.Module) -> None:
    from kdkernels.report.pictures import gkd_maps

    maps = gkd_maps(model, data, 1)
    image, target = data[1]
    images, targets = model.transform([image], [target])
    features = {k: v.detach().requires_grad_() for k, v in model.backbone(images.tensors).items()}
    model.train()
    head = model.head(list(features.values()))
    anchors = model.anchor_generator(images, list(features.values()))
    sizes = [x.shape[-2] * x.shape[-1] for x in features.values()]
    losses = model.compute_loss(targets, head, anchors, sizes)
    model.eval()
    sum(losses.values()).backward()
    assert list(maps) == list(features)
    for name, x in features.items():
        raw = (x.grad.mean((2, 3), keepdim=True) * x).sum(1).abs()[0].detach()
        wanted = (raw - raw.min()) / (raw.max() - raw.min())
        torch.testing.assert_close(maps[name], wanted, rtol=1e-3, atol=1e-4)


def test_bmfi_masks_are_those_of_the_loss(data: DetectionDataset, model: torch.nn.Module) -> None:
    from kdkernels.report.pictures import bmfi_masks

    bmfi = BMFILoss(mask="binary")
    masks = bmfi_masks(bmfi, model, data, 0)
    wanted = functional.box_mask([data.target(0)["boxes"]], (96, 320), [(12, 40), (6, 20), (3, 10)], kind="binary")
    assert [tuple(mask.shape) for mask in masks.values()] == [(12, 40), (6, 20), (3, 10)]
    for mask, other in zip(masks.values(), wanted, strict=True):
        torch.testing.assert_close(mask, other[0])
        assert mask.sum() > 0


def test_pictures_have_a_panel_for_every_image_and_model(data: DetectionDataset, model: torch.nn.Module, tmp_path: Path) -> None:
    from kdkernels.report.pictures import draw_bmfi_masks, draw_detections, draw_gkd_maps

    one = draw_detections({"a": model}, data, [0], tmp_path / "one.png")
    four = draw_detections({"a": model, "b": model}, data, [0, 1], tmp_path / "four.png")
    maps = draw_gkd_maps({"a": model}, data, [0], tmp_path / "maps.png")
    masks = draw_bmfi_masks(BMFILoss(), model, data, [0, 1], tmp_path / "masks.png")
    sizes = {path.stem: Image.open(path).size for path in (one, four, maps, masks)}
    assert sizes["four"][0] == 2 * sizes["one"][0] and sizes["four"][1] > 1.5 * sizes["one"][1]
    assert sizes["maps"][0] == sizes["masks"][0] == 4 * sizes["one"][0]


def test_the_page_is_one_file_and_escapes(tmp_path: Path) -> None:
    from kdkernels.report.page import write_page

    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    table = Table("t", ["", "x"], [["<script>", "1"]], ["note"])
    text = write_page(tmp_path / "r.html", "A & B", table, {"caption": tmp_path / "p.png"}, '{"a": 1}').read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<script>" not in text and "A &amp; B" in text
    assert 'src="data:image/png;base64,iVBOR' in text and "http" not in text
