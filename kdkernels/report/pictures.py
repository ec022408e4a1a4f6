"""Pictures of what detectors see and what distillation compares: detections, GKD maps, BMFI masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdkernels.data import DetectionDataset
from kdkernels.integrations import find_adapter
from kdkernels.losses import BMFILoss
from kdkernels.ops import box_mask, channel_mean, weighted_channel_sum
from kdkernels.teacher import Teacher

from .figure import grid, legend, save, show_boxes, show_image

SCORE = 0.3
ROW = (3.6, 1.35)


def busiest(dataset: DetectionDataset, count: int) -> list[int]:
    """Indices of the images with the most labelled objects, most first, equal ones in the data's order: chosen without seeing a result."""
    order = sorted(range(len(dataset)), key=lambda i: -sum(a.trains for a in dataset.items[i].annotations))
    return order[:count]


def draw_detections(models: Mapping[str, nn.Module], dataset: DetectionDataset, indices: Sequence[int], out: Path) -> Path:
    """A row an image, a column a model (name -> detector): detections of score over 0.3, ground truth dotted."""
    from kdkernels.evaluation import predict

    part = dataset.subset(indices)
    figure, panels = grid(len(part), len(models), ROW)
    for column, (name, model) in enumerate(models.items()):
        found = predict(model, part)
        for row, item in enumerate(part.items):
            axes, detections, truth = panels[row][column], found[item.image_id], part.target(row)
            show_image(axes, part.pixels(row), name if row == 0 else "")
            show_boxes(axes, truth["boxes"].tolist(), truth["labels"].tolist(), dashed=True)
            keep = detections["scores"] > SCORE
            show_boxes(axes, detections["boxes"][keep].tolist(), detections["labels"][keep].tolist())
    legend(figure, dataset.classes)
    return save(figure, out)


def draw_gkd_maps(models: Mapping[str, nn.Module], dataset: DetectionDataset, indices: Sequence[int], out: Path) -> Path:
    """A row per image and model: the image and GKD's map (min-max normalised) at every level, from the gradient of the model's loss."""
    maps = {name: [gkd_maps(model, dataset, i) for i in indices] for name, model in models.items()}
    levels = list(next(iter(maps.values()))[0])
    figure, panels = grid(len(indices) * len(models), 1 + len(levels), ROW)
    for i, index in enumerate(indices):
        for m, name in enumerate(models):
            row = panels[i * len(models) + m]
            pixels = dataset.pixels(index)
            show_image(row[0], pixels, name)
            truth = dataset.target(index)
            show_boxes(row[0], truth["boxes"].tolist(), truth["labels"].tolist(), dashed=True)
            for axes, level in zip(row[1:], levels, strict=True):
                overlay(axes, pixels, maps[name][i][level], f"level {level}" if i == m == 0 else "")
    return save(figure, out)


def draw_bmfi_masks(bmfi: BMFILoss, model: nn.Module, dataset: DetectionDataset, indices: Sequence[int], out: Path) -> Path:
    """A row an image: its boxes, and BMFI's box mask over it at every level of the model's features."""
    masks = [bmfi_masks(bmfi, model, dataset, i) for i in indices]
    levels = list(masks[0])
    figure, panels = grid(len(indices), 1 + len(levels), ROW)
    for i, index in enumerate(indices):
        pixels, truth = dataset.pixels(index), dataset.target(index)
        show_image(panels[i][0], pixels, f"mask {bmfi.mask!r}" if i == 0 else "")
        show_boxes(panels[i][0], truth["boxes"].tolist(), truth["labels"].tolist())
        for axes, level in zip(panels[i][1:], levels, strict=True):
            overlay(axes, pixels, masks[i][level], f"level {level}" if i == 0 else "")
    return save(figure, out)


def gkd_maps(model: nn.Module, dataset: DetectionDataset, index: int) -> dict[str, Tensor]:
    """Level -> (H, W) map in 0..1 of one image: |sum of channels weighted by their mean gradient|, min-max normalised (methods: GKD)."""
    images, targets = framed(model, dataset, index)
    teacher = Teacher(model)
    try:
        output = teacher(images, targets, gradients=True)
    finally:
        teacher.close()
    gradients = {name: g for name, g in (output.gradients or {}).items() if g is not None}
    names = [name for name in output.features if name in gradients]
    weights = channel_mean([gradients[name] for name in names])
    maps, low, high = weighted_channel_sum([output.features[name] for name in names], weights)
    # A constant map (no gradient, say) has nothing to show and is 0.
    return {
        name: ((m - lo.view(-1, 1, 1)) / (hi - lo).clamp(min=torch.finfo(m.dtype).tiny).view(-1, 1, 1))[0]
        for name, m, lo, hi in zip(names, maps, low, high, strict=True)
    }


def bmfi_masks(bmfi: BMFILoss, model: nn.Module, dataset: DetectionDataset, index: int) -> dict[str, Tensor]:
    """Level -> (H, W) box mask of one image, as `bmfi` makes it for the levels of the model."""
    images, targets = framed(model, dataset, index)
    teacher = Teacher(model)
    try:
        features = teacher(images, targets).features
    finally:
        teacher.close()
    boxes, counts, size = find_adapter(model).frame(model, images, targets)
    sizes = [(x.shape[-2], x.shape[-1]) for x in features.values()]
    masks = box_mask((boxes, counts), size, sizes, kind=bmfi.mask, expand=bmfi.expand, placement=bmfi.placement)
    return {name: mask[0] for name, mask in zip(features, masks, strict=True)}


def framed(model: Any, dataset: DetectionDataset, index: int) -> tuple[Any, Any]:
    """One image and its target as the model's own transform makes them."""
    image, target = dataset[index]
    with torch.no_grad():
        return model.transform([image], [target])


def overlay(axes: Any, pixels: np.ndarray, values: Tensor, title: str) -> None:
    """A map over the grey image, stretched to it."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(axis=2), cmap="gray", alpha=0.6)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(values.float().cpu().numpy(), cmap="inferno", alpha=0.6, extent=extent, interpolation="nearest")
    if title:
        axes.set_title(title, fontsize=8)
