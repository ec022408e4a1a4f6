"""COCO box AP (IoU .50:.95, 101 recall points, 100 detections an image) by pycocotools or a class that works like its COCOeval."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from kdkernels.data.dataset import DetectionDataset

#: The twelve numbers of COCOeval.summarize, in its order.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

Detections = dict[int, dict[str, torch.Tensor]]


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: DetectionDataset,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Detections:
    """Run a torchvision-style detector over a dataset: image id -> {"boxes" (n, 4) xyxy, "labels" (n,), "scores" (n,)} on the CPU.

    The model is in evaluation mode meanwhile and gets its mode back, module by module. `device` defaults to where its parameters are;
    `progress` is called with (images done, images in all).
    """
    device = torch.device(device) if device is not None else next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found: Detections = {}
    try:
        for start in range(0, len(dataset), batch_size):
            indices = range(start, min(start + batch_size, len(dataset)))
            outputs = model([dataset[i][0].to(device) for i in indices])
            for i, output in zip(indices, outputs, strict=True):
                found[dataset.items[i].image_id] = {key: output[key].detach().cpu() for key in ("boxes", "labels", "scores")}
            if progress is not None:
                progress(indices[-1] + 1, len(dataset))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


def evaluate_detector(
    model: nn.Module,
    dataset: DetectionDataset,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    coco_eval: type | tuple[type, type] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """COCO AP of a detector on a dataset; the arguments of `predict` and the result of `evaluate_detections`."""
    return evaluate_detections(dataset.coco(), predict(model, dataset, batch_size, device, progress), coco_eval)


def evaluate_detections(
    ground_truth: dict[str, Any], detections: Detections, coco_eval: type | tuple[type, type] | None = None
) -> dict[str, float]:
    """COCO AP of detections against a COCO dictionary; prints nothing.

    `coco_eval` is a class with COCOeval's constructor and methods, or the pair (COCO class, COCOeval class) of a package that needs its
    own; default: faster-coco-eval when it is installed, else pycocotools. Returns "bbox/AP", "bbox/AP50" and the rest of `STATS`, then
    "bbox/AP/<class>" and "bbox/AP50/<class>", all in 0..1, and -1 (as in pycocotools) where there is no ground truth to find.
    """
    coco_class, eval_class = _backend(coco_eval)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class()
        # A copy, because COCOeval writes "ignore" into the annotations.
        truth.dataset = {**ground_truth, "annotations": [dict(entry) for entry in ground_truth["annotations"]]}
        truth.createIndex()
        found = coco_class()
        found.dataset = {**ground_truth, "annotations": list(_results(detections))}
        found.createIndex()
        run = eval_class(truth, found, iouType="bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    values = {f"bbox/{name}": float(value) for name, value in zip(STATS, run.stats, strict=False)}
    precision = np.asarray(run.eval["precision"])  # (IoU, recall, class, area, detections)
    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    for k, category in enumerate(run.params.catIds):
        values[f"bbox/AP/{names[category]}"] = _mean(precision[:, :, k, 0, -1])
        values[f"bbox/AP50/{names[category]}"] = _mean(precision[0, :, k, 0, -1])
    return values


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0


def _results(detections: Detections) -> Iterable[dict[str, Any]]:
    """Detections as COCO annotations, ids from 1 (COCO.loadRes does the same but fails on an empty list)."""
    number = 0
    for image_id, output in detections.items():
        boxes, labels, scores = (output[k].tolist() for k in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True):
            number += 1
            w, h = x2 - x1, y2 - y1
            yield {
                "id": number, "image_id": image_id, "category_id": label, "score": score,
                "bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0,
            }  # fmt: skip


def _backend(coco_eval: type | tuple[type, type] | None) -> tuple[type, type]:
    if isinstance(coco_eval, tuple):
        return coco_eval
    if coco_eval is None and importlib.util.find_spec("faster_coco_eval") is not None:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster

        return FasterCOCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, coco_eval or COCOeval
