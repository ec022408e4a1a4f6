"""COCO AP against pycocotools called directly and against hand-made cases."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import sys
import types

import numpy as np
import pytest
import torch
from data_support import kitti_root, line, write_kitti
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from kdkernels.data import load_dataset
from kdkernels.evaluation import evaluate_detections, evaluate_detector, predict
from kdkernels.evaluation.coco import STATS


def _detections(rows):
    """image id -> rows of (x1, y1, x2, y2, label, score)."""
    found = {}
    for image_id, boxes in rows.items():
        table = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 6)
        found[image_id] = {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}
    return found


def _truth(dataset):
    """Detections equal to the ground truth."""
    rows = {}
    for i, item in enumerate(dataset.items):
        target = dataset.target(i)
        boxes = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        rows[item.image_id] = [[*box, label, 0.9 - 0.01 * k] for k, (box, label) in enumerate(boxes)]
    return _detections(rows)


def _noisy(dataset, seed=0):
    """Moved, repeated, missed and invented boxes."""
    rng = np.random.default_rng(seed)
    rows = {}
    for item in dataset.items:
        rows[item.image_id] = []
        for annotation in item.annotations:
            for _ in range(rng.integers(0, 3)):
                box = np.array(annotation.box) + rng.normal(0, 0.06, 4) * np.sqrt(annotation.area)
                label = annotation.label or int(rng.integers(1, 4))
                rows[item.image_id].append([*np.sort(box.reshape(2, 2), 0).ravel(), label, rng.random()])
        for _ in range(rng.integers(0, 4)):
            x, y = rng.uniform(0, 40, 2)
            rows[item.image_id].append([x, y, x + 9, y + 9, int(rng.integers(1, 4)), rng.random()])
    return _detections(rows)


def _pycocotools(truth, detections, category=None):
    """The twelve numbers by the package's own loading of results."""
    results = [
        {"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for i, d in detections.items()
        for (x1, y1, x2, y2), label, score in zip(d["boxes"].tolist(), d["labels"].tolist(), d["scores"].tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), "bbox")
        if category is not None:
            run.params.catIds = [category]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


@pytest.fixture
def frames(tmp_path):
    return load_dataset(kitti_root(tmp_path), size=120, verify=False)


def test_equal_to_pycocotools(frames, capsys):
    detections = _noisy(frames)
    got = evaluate_detections(frames.coco(), detections, COCOeval)
    assert [got[f"bbox/{name}"] for name in STATS] == _pycocotools(frames.coco(), detections)
    for category, name in enumerate(frames.classes, start=1):
        alone = _pycocotools(frames.coco(), detections, category)
        assert got[f"bbox/AP/{name}"] == pytest.approx(alone[0], abs=1e-12)
        assert got[f"bbox/AP50/{name}"] == pytest.approx(alone[1], abs=1e-12)
    assert 0.05 < got["bbox/AP"] < got["bbox/AP50"] < 0.95
    assert capsys.readouterr().out == ""


def test_perfect_detections(frames):
    got = evaluate_detections(frames.coco(), _truth(frames))
    assert got["bbox/AP"] == pytest.approx(1)
    assert all(got[f"bbox/AP/{name}"] == pytest.approx(1) for name in frames.classes)


def test_average_precision_by_hand(tmp_path):
    # Two cars; the best-scored box misses, the second hits one: precision 1/2 at recalls up to 1/2, at every IoU threshold.
    root = write_kitti(tmp_path, {"a": [line("Car", (0, 0, 19, 19)), line("Car", (30, 20, 49, 39))]})
    dataset = load_dataset(root)
    detections = _detections({1: [[50, 0, 60, 10, 1, 0.9], [0, 0, 20, 20, 1, 0.8]]})
    got = evaluate_detections(dataset.coco(), detections)
    assert got["bbox/AP/Car"] == pytest.approx(0.5 * 51 / 101)
    assert got["bbox/AP"] == pytest.approx(0.5 * 51 / 101)
    # IoU 16 / 20 = 0.8: a hit up to the threshold 0.8, 7 of the 10.
    detections = _detections({1: [[0, 0, 16, 20, 1, 0.9], [30, 20, 50, 40, 1, 0.8]]})
    got = evaluate_detections(dataset.coco(), detections)
    assert got["bbox/AP50"] == pytest.approx(1)
    assert got["bbox/AP/Car"] == pytest.approx(0.7 + 0.3 * 0.5 * 51 / 101)


def test_ids_start_at_one(tmp_path):
    # An annotation of id 0 never counts as found; the same detections on the same data, from 0 and as we write it.
    dataset = load_dataset(write_kitti(tmp_path, {"a": [line("Car", (0, 0, 19, 19)), line("Car", (30, 20, 49, 39))]}))
    truth = dataset.coco()
    assert evaluate_detections(truth, _truth(dataset))["bbox/AP"] == pytest.approx(1)
    for entry in truth["annotations"]:
        entry["id"] -= 1
    assert evaluate_detections(truth, _truth(dataset), COCOeval)["bbox/AP"] < 0.6


def test_ignored_regions(tmp_path):
    # A DontCare region forgives detections of every class inside it, and finding nothing in it costs nothing.
    root = write_kitti(
        tmp_path, {"a": [line("Car", (0, 0, 9, 9)), line("Cyclist", (0, 20, 9, 29)), line("DontCare", (30, 10, 60, 40), -1, -1)]}
    )
    dataset = load_dataset(root)
    right = [[0, 0, 10, 10, 1, 0.5], [0, 20, 10, 30, 3, 0.5]]
    inside = [[35, 15, 45, 25, label, 0.9] for label in (1, 3) for _ in range(2)]
    outside = [[15, 0, 25, 10, 1, 0.9]]
    truth = dataset.coco()
    assert evaluate_detections(truth, _detections({1: right}))["bbox/AP"] == pytest.approx(1)
    assert evaluate_detections(truth, _detections({1: right + inside}))["bbox/AP"] == pytest.approx(1)
    got = evaluate_detections(truth, _detections({1: right + inside + outside}))
    assert got["bbox/AP/Car"] == pytest.approx(0.5)
    assert got["bbox/AP/Cyclist"] == pytest.approx(1)
    # The key "ignore" alone would not do: pycocotools overwrites it.
    for entry in truth["annotations"]:
        entry["iscrowd"] = 0
    assert evaluate_detections(truth, _detections({1: right + inside}))["bbox/AP"] < 0.6
    assert all(entry["ignore"] == 1 for entry in truth["annotations"] if entry["type"] == "DontCare")  # the caller's is not written to


def test_class_without_ground_truth_and_no_detections(tmp_path):
    dataset = load_dataset(write_kitti(tmp_path, {"a": [line("Car", (0, 0, 9, 9))], "b": []}))
    got = evaluate_detections(dataset.coco(), _detections({1: [[0, 0, 10, 10, 1, 0.5]], 2: []}))
    assert got["bbox/AP"] == got["bbox/AP/Car"] == pytest.approx(1)
    assert got["bbox/AP/Pedestrian"] == got["bbox/AP50/Cyclist"] == -1
    for nothing in ({}, _detections({1: [], 2: []})):
        got = evaluate_detections(dataset.coco(), nothing)
        assert got["bbox/AP"] == got["bbox/AP/Car"] == 0
        assert got["bbox/AP/Pedestrian"] == -1


def test_no_ground_truth_at_all(tmp_path):
    dataset = load_dataset(write_kitti(tmp_path, {"a": []}))
    got = evaluate_detections(dataset.coco(), _detections({1: [[0, 0, 10, 10, 1, 0.5]]}))
    assert got["bbox/AP"] == got["bbox/AP/Car"] == -1
    assert evaluate_detections(dataset.coco(), {})["bbox/AP"] == -1


def test_any_class_that_works_like_cocoeval(frames):
    used = []

    class OwnCOCO(COCO):
        pass

    class OwnEval(COCOeval):
        def __init__(self, truth, found, iouType):
            used.append((type(truth), type(found)))
            super().__init__(truth, found, iouType)

    detections = _noisy(frames)
    want = evaluate_detections(frames.coco(), detections, COCOeval)
    assert evaluate_detections(frames.coco(), detections, OwnEval) == want
    assert evaluate_detections(frames.coco(), detections, (OwnCOCO, OwnEval)) == want
    assert used == [(COCO, COCO), (OwnCOCO, OwnCOCO)]


def test_faster_coco_eval_is_taken_when_it_is_there(frames, monkeypatch):
    used = []

    class COCOeval_faster(COCOeval):
        def __init__(self, *args, **options):
            used.append(True)
            super().__init__(*args, **options)

    module = types.ModuleType("faster_coco_eval")
    module.__spec__ = importlib.machinery.ModuleSpec("faster_coco_eval", None)
    module.COCO, module.COCOeval_faster = COCO, COCOeval_faster
    monkeypatch.setitem(sys.modules, "faster_coco_eval", module)
    evaluate_detections(frames.coco(), {})
    assert used == [True]
    evaluate_detections(frames.coco(), {}, COCOeval)
    assert used == [True]


class Oracle(nn.Module):
    """Gives the ground truth of an image, which it finds by its pixels; one box per image is moved."""

    def __init__(self, dataset):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.inner = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        self.inner[1].eval()
        self.answers = {dataset[i][0].sum().item(): dataset.target(i) for i in range(len(dataset))}
        self.batches = []

    def forward(self, images):
        assert not self.training
        assert not self.inner[0].training
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        targets = [self.answers[image.sum().item()] for image in images]
        return [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.full((len(t["labels"]),), 0.7)} for t in targets]


def test_evaluate_detector(frames):
    model = Oracle(frames)
    seen = []
    got = evaluate_detector(model, frames, batch_size=5, progress=lambda *done: seen.append(done))
    assert got["bbox/AP"] == pytest.approx(1)
    assert sum(model.batches) == len(frames)
    assert set(model.batches[:-1]) == {5}
    assert seen[-1] == (len(frames), len(frames))
    assert model.training
    assert model.inner[0].training
    assert not model.inner[1].training


def test_the_mode_comes_back_after_an_error(frames):
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="no"):
        evaluate_detector(model, frames)
    assert model.training


def test_a_real_detector(tmp_path):
    from torchvision.models.detection import fcos_resnet50_fpn

    dataset = load_dataset(write_kitti(tmp_path, {"a": [line()], "b": []}))
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=48, max_size=64)
    found = predict(model, dataset, batch_size=2, device="cpu")
    assert sorted(found) == [1, 2]
    assert all(d["boxes"].shape == (len(d["scores"]), 4) for d in found.values())
    got = evaluate_detector(model, dataset)
    assert 0 <= got["bbox/AP"] <= 1
    assert set(got) >= {"bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/AP/Car", "bbox/AP50/Cyclist"}
