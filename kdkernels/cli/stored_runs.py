"""Detectors that are trained and evaluated to be compared, each in a folder of its own: what `demo` and `compare-methods` share."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdkernels import backend_info
from kdkernels.data import DetectionDataset, load_dataset
from kdkernels.data.synthetic import render_dataset
from kdkernels.evaluation import evaluate_detector
from kdkernels.losses import DistillationLoss
from kdkernels.models import DetectorSpec, build_detector
from kdkernels.training import TrainConfig, TrainResult, train

from .config import DataSection, ModelSection, RunConfig
from .console import Report, Stages

ROW = "row.json"


class StoredRuns:
    """Rendered data under `folder`/data, and runs on it."""

    def __init__(self, folder: Path, stages: Stages) -> None:
        self.folder, self.stages = folder, stages

    def data(self, part: str, images: int, seed: int) -> DetectionDataset:
        """Render a data set unless it is there, complete, and read it."""
        root = self.folder / "data" / part
        if not root.is_dir():
            unfinished = root.with_name(part + ".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            with self.stages.stage(f"rendering {part} images") as progress:
                render_dataset(unfinished, images, seed, progress)
            os.replace(unfinished, root)
            self.stages.line(f"rendered {images} {part} images")
        return load_dataset(root, "kitti")

    def describe_data(self, train_set: DetectionDataset, val_set: DetectionDataset) -> dict[str, Any]:
        return {
            "train_images": len(train_set),
            "val_images": len(val_set),
            "size": [train_set.items[0].height, train_set.items[0].width],
            "objects": {"train": train_set.class_counts(), "val": val_set.class_counts()},
            "sha256": {part: files_hash(self.folder / "data" / part) for part in ("train", "val")},
        }

    def train(
        self,
        title: str,
        spec: DetectorSpec,
        config: TrainConfig,
        data: tuple[DetectionDataset, DetectionDataset],
        teacher: nn.Module | None,
        losses: Mapping[str, DistillationLoss],
        progress: Report,
    ) -> TrainResult:
        """Train a new detector on the first of `data` and evaluate it on the second."""
        # Every student of a seed is built from the same random stream, so that all have the same weights.
        torch.manual_seed(config.seed)
        model = build_detector(spec)

        def evaluate(detector: nn.Module, images: DetectionDataset) -> dict[str, float]:
            with self.stages.stage(f"{title}: evaluation") as report:
                return evaluate_detector(detector, images, progress=report)

        taught = teacher if losses or config.init_student else None
        return train(model, spec, *data, config, taught, losses or None, console=False, progress=progress, evaluate=evaluate)

    def run_config(self, spec: DetectorSpec, config: TrainConfig, teacher: Path | None, losses: Mapping[str, Any]) -> RunConfig:
        """The same run as `kdkernels distill` would describe it, so that `evaluate` finds the data."""
        data = DataSection(root=str(self.folder / "data" / "train"), val=str(self.folder / "data" / "val"))
        known = {f.name for f in fields(ModelSection)}
        values: dict[str, Any] = {key: value for key, value in spec.to_dict().items() if key in known}
        return RunConfig(data, ModelSection(**values), None if teacher is None else str(teacher), dict(losses), config)


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured with."""
    packages = ("kdkernels", "torchvision", "numpy", "pycocotools")
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "backend": next((name for name, values in backend_info().items() if values["active"]), None),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **{p: metadata.version(p) for p in packages}},
    }


def can_resume(folder: Path) -> bool:
    """Whether a run was stopped there."""
    return (folder / "checkpoints" / "last.pt").is_file()


def files_hash(root: Path) -> str:
    """SHA-256 over the names and bytes of all files under a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, values: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
