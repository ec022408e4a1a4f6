"""A data set of a few images made on the fly, and the shortest runs that are still real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from kdkernels.data import Annotation, DetectionDataset, Item
from kdkernels.models import DetectorSpec, build_detector

CLASSES = ["Car", "Pedestrian", "Cyclist"]
SPEC = DetectorSpec(backbone="slim-student", num_classes=4, min_size=64, max_size=96)


def tiny_dataset(folder: Path, images: int = 8, height: int = 64, width: int = 96) -> DetectionDataset:
    """Noise with bright rectangles; image 0 has no box. The same for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    items = []
    for i in range(images):
        pixels = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
        annotations = []
        for label in random.integers(1, 4, 0 if i == 0 else 2).tolist():
            x, y = int(random.integers(0, width - 40)), int(random.integers(0, height - 32))
            w, h = int(random.integers(14, 38)), int(random.integers(12, 30))
            pixels[y : y + h, x : x + w] = 60 * label + 60
            annotations.append(Annotation(box=(x, y, x + w, y + h), label=label, area=w * h))
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        items.append(Item(path, str(i), path.name, i + 1, width, height, tuple(annotations)))
    return DetectionDataset(items, CLASSES)


def student(seed: int = 0, spec: DetectorSpec = SPEC) -> nn.Module:
    """A detector whose weights depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_detector(spec)


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
