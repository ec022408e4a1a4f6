"""Why GKD's map term teaches little: gradient sizes, who collects the gradient, and how steady the maps are.

`python -m benchmarks.studies.gkd_map_diagnosis` needs the data and the teacher that gkd_ablation.py makes, and writes
gkd-map-diagnosis.json beside its results.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import FeatureTap, Teacher, functional
from kdkernels.data import collate
from kdkernels.data.transforms import hflip
from kdkernels.models import build_detector
from kdkernels.recipes import DEMO, student_spec, teacher_spec, train_config
from kdkernels.reference.map_distance import normalize_map
from kdkernels.teacher import loss_mode, scaled_gradients
from kdkernels.training import train

from .gkd_ablation import RESULTS, ROOT, datasets

BATCHES, BATCH, WARM = 8, 8, 150


def features_and_gradients(model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Features at the head's inputs and the gradient of the model's own detection loss there."""

    def leaves(_: str, features: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, x.detach().requires_grad_()) for name, x in features.items())

    with loss_mode(model), FeatureTap(model, "backbone", replace=leaves) as tap:
        losses = model(images, targets)
    gradients = scaled_gradients(losses, tap.features)
    arrived = [g for name in tap.features if (g := gradients[name]) is not None]
    return [x.detach() for x in tap.features.values()], arrived


def maps(features: list[Tensor], gradients: list[Tensor], mode: str = "signed") -> list[Tensor]:
    found, _, _ = functional.weighted_channel_sum(features, functional.channel_mean(gradients, mode=mode))
    return [normalize_map(r) for r in found]


def correlation(a: Tensor, b: Tensor) -> list[float]:
    """Pearson's r of each image's maps (N, H, W)."""
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).tolist()


def diagnose(teacher: nn.Module, student: nn.Module, data: Any) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[list[float]]] = {}

    def note(name: str, level: int, values: list[float]) -> None:
        found.setdefault(name, [[], [], []])[level].extend(values)

    for first in range(0, BATCHES * BATCH, BATCH):
        images, targets = collate([data[i] for i in range(first, first + BATCH)])
        f_t, g_t = features_and_gradients(teacher, images, targets)
        f_s, g_s = features_and_gradients(student, images, targets)
        mirrored, mirrored_targets = zip(*(hflip(image, target) for image, target in zip(images, targets, strict=True)), strict=True)
        f_m, g_m = features_and_gradients(teacher, list(mirrored), list(mirrored_targets))
        student_leaves = [x.clone().requires_grad_() for x in f_s]
        loss = functional.gkd(student_leaves, f_t, g_s, g_t)
        kd = torch.autograd.grad(loss, student_leaves)
        spatial, _ = functional.attention(f_t, 0.5)
        spatial_m, _ = functional.attention(f_m, 0.5)
        columns = (maps(f_t, g_t), maps(f_m, g_m), maps(f_s, g_s), kd, g_s, spatial, spatial_m)
        raw, _, _ = functional.weighted_channel_sum([x.detach() for x in f_s], functional.channel_mean(g_s, mode="signed"))
        for level, (m_t, m_m, m_s, d_kd, d_task, s, s_m) in enumerate(zip(*columns, strict=True)):
            note("kd gradient / detection gradient, weight 1", level, [float(d_kd.norm() / d_task.norm())])
            power = d_kd.square().sum(1).flatten(1)
            r = raw[level].flatten(1)
            extremes = torch.stack([r.argmin(1), r.argmax(1)], 1)
            note("share of the kd gradient's square in two pixels", level, (power.gather(1, extremes).sum(1) / power.sum(1)).tolist())
            note("teacher's map against itself mirrored, r", level, correlation(m_t, m_m.flip(-1)))
            note("teacher's attention against itself mirrored, r", level, correlation(s, s_m.flip(-1)))
            note("student's map against teacher's, r", level, correlation(m_s, m_t))
            note("mean of the teacher's map", level, m_t.mean((1, 2)).tolist())
    return {name: [{"median": median(values), "count": len(values)} for values in levels] for name, levels in found.items()}


def teacher_losses(teacher: Any, data: Any) -> dict[str, dict[str, float]]:
    """AID's D_n of the teacher on images as they are and upside down: median, and what AID's weight exp(-alpha D_n) then is."""
    asked = Teacher(teacher)

    def each_image(images: Any, targets: Any) -> list[float]:
        losses = asked(images, targets, losses=True).losses
        assert losses is not None, "they were asked for"
        return losses.tolist()

    found: dict[str, list[float]] = {"right way up": [], "upside down": []}
    for first in range(0, BATCHES * BATCH, BATCH):
        images, targets = teacher.transform(*collate([data[i] for i in range(first, first + BATCH)]))
        found["right way up"] += each_image(images, targets)
        images.tensors = images.tensors.flip(2)
        found["upside down"] += each_image(images, targets)
    asked.close()
    medians = {name: median(values) for name, values in found.items()}
    return {name: {"D": d, "weight, alpha 0.1": math.exp(-0.1 * d), "weight, alpha 1": math.exp(-d)} for name, d in medians.items()}


def main() -> None:
    folder: Path = ROOT / "runs" / "ablation"
    train_set, val_set = datasets(folder)
    teacher = build_detector(teacher_spec())
    teacher.load_state_dict(torch.load(folder / "teacher-good.pt", weights_only=True)["state"])
    teacher.requires_grad_(False)
    torch.manual_seed(0)
    student = build_detector(student_spec())
    train(student, None, train_set, None, train_config(DEMO, WARM, 0), console=False)
    student.requires_grad_(False)
    result: dict[str, Any] = {
        "training images": diagnose(teacher, student, train_set),
        "validation images": diagnose(teacher, student, val_set),
        "teacher's loss an image": teacher_losses(teacher, train_set),
    }
    path = RESULTS.with_name("gkd-map-diagnosis.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
