"""Pairs of teacher and student, and the batch that they see. Random weights and pixels: only the sizes matter here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.models import DetectorSpec, build_detector

BOXES = 10


@dataclass(frozen=True)
class Pair:
    """Two detectors of one family, equal in neck and head.

    detector: "fcos" or "fasterrcnn";   teacher, student: their backbones;   image: (height, width) in pixels, multiples of 32 so that
    nothing is padded;   classes: the background included;   rois: an image that Faster R-CNN trains on (None: torchvision's 512)
    """

    detector: str
    teacher: str
    student: str
    image: tuple[int, int]
    classes: int
    rois: int | None = None


def _large(detector: str, student: str) -> Pair:
    return Pair(detector, "resnet101", student, (800, 1344), 91)


def _small(detector: str) -> Pair:
    return Pair(detector, "slim-teacher", "slim-student", (256, 416), 4, rois=64)


PAIRS: dict[str, Pair] = {
    "fcos-r101-r50": _large("fcos", "resnet50"),
    "fcos-r101-r18": _large("fcos", "resnet18"),
    "frcnn-r101-r50": _large("fasterrcnn", "resnet50"),
    "frcnn-r101-r18": _large("fasterrcnn", "resnet18"),
    "fcos-small": _small("fcos"),
    "frcnn-small": _small("fasterrcnn"),
}


class Batch(NamedTuple):
    """What a torchvision detector takes in training: N images (3, H, W) in 0..1, N targets."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]


def make_batch(pair: Pair, size: int, device: torch.device, seed: int = 0) -> Batch:
    """`size` images of the pair's size with `BOXES` boxes each, 16 pixels to half the image wide and high, all inside."""
    generator = torch.Generator().manual_seed(seed)
    height, width = pair.image
    extent = torch.tensor([width, height], dtype=torch.float32)
    images, targets = [], []
    for _ in range(size):
        images.append(torch.rand(3, height, width, generator=generator).to(device))
        side = 16 * (extent / 32) ** torch.rand(BOXES, 2, generator=generator)
        corner = torch.rand(BOXES, 2, generator=generator) * (extent - side)
        labels = torch.randint(1, pair.classes, (BOXES,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], 1).to(device), "labels": labels.to(device)})
    return Batch(images, targets)


def make_models(pair: Pair, batch: Batch, device: torch.device, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Teacher and student, the student in training mode."""
    torch.manual_seed(seed)
    teacher, student = (_build(pair, backbone, device) for backbone in (pair.teacher, pair.student))
    _settle(teacher, batch)
    return teacher, student.train()


def _build(pair: Pair, backbone: str, device: torch.device) -> nn.Module:
    model: Any = build_detector(DetectorSpec(pair.detector, backbone, pair.classes, min_size=min(pair.image), max_size=max(pair.image)))
    if pair.rois is not None and pair.detector == "fasterrcnn":
        model.roi_heads.fg_bg_sampler.batch_size_per_image = pair.rois
    return model.to(device)


@torch.no_grad()
def _settle(model: Any, batch: Batch) -> None:
    """Gives the batch normalisation of a network that was never trained the batch's own statistics.

    It runs in eval mode as a teacher; with statistics of 0 and 1 the features would double from block to block and be 1e5 at the neck.
    """
    with _momentum(model.train(), 1.0):
        model.backbone(model.transform(batch.images)[0].tensors)


@contextmanager
def _momentum(model: nn.Module, value: float) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = value
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
