"""The pictures of docs/methods/: what each method's mask or map is on one rendered scene.

    python -m benchmarks.report.method_pictures TEACHER STUDENT DATA

TEACHER, STUDENT: run folders of two FCOS, as `kdkernels compare-methods` leaves them;   DATA: its folder data/val
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdkernels import ACAMLoss, functional
from kdkernels.data import DetectionDataset, load_dataset
from kdkernels.integrations import find_adapter
from kdkernels.losses.assignment import assign
from kdkernels.losses.fgfi import near_anchors
from kdkernels.losses.gid import general_instances
from kdkernels.models import load_detector
from kdkernels.ops.box_mask import background
from kdkernels.outputs import HeadOutputs, best_scores
from kdkernels.report.figure import grid, legend, save, show_boxes, show_image
from kdkernels.report.pictures import busiest, framed, overlay
from kdkernels.teacher import Teacher, TeacherOutput

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"
PANEL = (3.2, 1.25)
IMAGES, DPI = 9, 70
Maps = list[Tensor]


class Scene(NamedTuple):
    """An image, its boxes in pixels of the padded batch, and what both networks say about it."""

    pixels: np.ndarray
    target: dict[str, Tensor]
    boxes: list[Tensor]
    size: tuple[int, int]
    teacher: TeacherOutput
    student: TeacherOutput

    @property
    def features(self) -> Maps:
        return list(self.teacher.features.values())

    @property
    def pair(self) -> tuple[Maps, Maps]:
        return list(self.student.features.values()), self.features

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(x.shape[2], x.shape[3]) for x in self.features]

    @property
    def outputs(self) -> tuple[HeadOutputs, HeadOutputs]:
        assert self.student.outputs is not None and self.teacher.outputs is not None  # asked for in `scene`
        return self.student.outputs, self.teacher.outputs

    def mask(self, kind: str) -> Maps:
        return functional.box_mask(self.boxes, self.size, self.sizes, kind)


def scene(teacher: Any, student: Any, data: DetectionDataset, index: int) -> Scene:
    images, targets = framed(teacher, data, index)
    said = []
    for model in (teacher, student):
        watcher = Teacher(model)
        said.append(watcher(images, targets, gradients=True, losses=True, anchors=True, outputs=True, crosses=True))
        watcher.close()
    boxes, counts, size = find_adapter(teacher).frame(teacher, images, targets)
    return Scene(data.pixels(index), data.target(index), [boxes[0, : int(counts[0])]], size, said[0], said[1])


def error(student: Maps, teacher: Maps) -> Maps:
    return [(s - t).square().sum(1) for s, t in zip(student, teacher, strict=True)]


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6)


def attention(features: Maps, temperature: float = 0.5) -> Maps:
    return functional.attention(features, temperature)[0]


def gkd_map(shown: Scene) -> Maps:
    assert shown.teacher.gradients is not None  # asked for in `scene`
    gradients = [g for g in shown.teacher.gradients.values() if g is not None]
    raw, _, _ = functional.weighted_channel_sum(shown.features, functional.channel_mean(gradients))
    return [functional.normalize_map(m) for m in raw]


def cells(values: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Maps:
    """(N, A) of one anchor a cell as maps."""
    return [x.float().view(-1, *size) for x, size in zip(values, sizes, strict=True)]


def crossed(shown: Scene, teacher: Any) -> Maps:
    assert shown.student.head is not None and shown.teacher.head is not None and shown.teacher.anchors is not None
    outputs = find_adapter(teacher).cross(teacher, shown.student.head, shown.teacher.head, shown.teacher.anchors)  # type: ignore[attr-defined]
    pairs = zip(outputs.classification, shown.outputs[1].classification, strict=True)
    return cells([(a.sigmoid() - b.sigmoid()).abs().amax(2) for a, b in pairs], shown.sizes)


def concentrated(features: Maps) -> Maps:
    """The softmax over the finest level of its three channels with the largest peaks."""
    distributions = features[0].flatten(2).softmax(2).view_as(features[0])
    best = distributions.amax((2, 3))[0].topk(3).indices
    return [distributions[:, c] for c in best]


def mutual_masks(shown: Scene) -> Maps:
    """The first of ACAM's masks of the finest level, as they are before any training."""
    student, teacher = ([x[0]] for x in shown.pair)
    masks = ACAMLoss().build(student, teacher).trainable
    assert masks is not None
    return [m.view(-1, *shown.sizes[0]) for m in masks(student, teacher).spatial[0][0, :3].split(1)]


def assigned(shown: Scene) -> Maps:
    """1 for LD's positives, a third of the IoU for its region."""
    assert shown.teacher.anchors is not None
    found = assign(shown.teacher.anchors, shown.boxes)
    return cells([p + r * ~p / 3 for p, r in zip(found.positive, found.region, strict=True)], shown.sizes)


def near(shown: Scene) -> Maps:
    assert shown.teacher.anchors is not None
    return near_anchors(shown.teacher.anchors, shown.boxes, shown.sizes)


def random_masks(shown: Scene) -> Maps:
    return [m[:, 0] for m in functional.random_mask([torch.ones_like(x[:, :1]) for x in shown.features], torch.tensor([0, 0]), 0.65)]


def rows(shown: Scene, teacher: Any) -> dict[str, dict[str, Maps]]:
    """Page -> a row of maps each."""
    student, features = shown.pair
    cam = gkd_map(shown)
    means = [(a + b) / 2 for a, b in zip(attention(student), attention(features), strict=True)]
    return {
        "fitnets": {"squared difference": error(student, features)},
        "fgfi": {"near the objects": near(shown)},
        "defeat": {"objects": shown.mask("assigned")},
        "fgd": {
            "objects": [m * a for m, a in zip(shown.mask("area"), attention(features), strict=True)],
            "background": [background(m) * a for m, a in zip(shown.mask("area"), attention(features), strict=True)],
        },
        "gmask": {"gaussian": shown.mask("gaussian"), "exponential": shown.mask("exponential")},
        "cam": {"activation map": cam, "times mask": [c * m.sqrt() for c, m in zip(cam, shown.mask("gaussian"), strict=True)]},
        "fbkd": {"mean attention": means},
        "mgd": {"random mask": random_masks(shown)},
        "cwd": {"channels of the finest level": concentrated(features)},
        "pkd": {"normalised difference": error([standardised(x) for x in student], [standardised(x) for x in features])},
        "frs": {"teacher's scores": cells(best_scores(shown.outputs[1]), shown.sizes)},
        "ld": {"positives and region": assigned(shown)},
        "crosskd": {"difference of scores": crossed(shown, teacher)},
        "acam": {"masks of the finest level": mutual_masks(shown)},
        "gkd": {"gradient-weighted map": cam},
        "bmfi": {"box mask": shown.mask("gaussian")},
        "pad": {"squared deviation": [(x - x.mean()).square().mean(1) for x in student]},
    }


def draw_maps(shown: Scene, maps: dict[str, Maps], out: Path) -> Path:
    """A row a kind of map: the image with its boxes, and the maps."""
    figure, panels = grid(len(maps), 1 + len(next(iter(maps.values()))), PANEL)
    for row, (name, levels) in zip(panels, maps.items(), strict=True):
        show_image(row[0], shown.pixels, name)
        show_boxes(row[0], shown.target["boxes"].tolist(), shown.target["labels"].tolist(), dashed=True)
        for i, (axes, level) in enumerate(zip(row[1:], levels, strict=True)):
            overlay(axes, shown.pixels, level[0], f"{level.shape[1]} x {level.shape[2]} cells" if i < len(levels) else "")
    return save(figure, out, DPI)


def draw_instances(shown: Scene, out: Path) -> Path:
    """GID's instances: solid where the teacher is the more certain, dotted where the student is."""
    figure, panels = grid(1, 1, (2 * PANEL[0], 2 * PANEL[1]))
    show_image(panels[0][0], shown.pixels, "general instances")
    student, teacher = shown.outputs
    instances = general_instances(student, teacher, 8.0 * max(shown.size))[0]
    every = torch.cat(teacher.boxes, 1)[0]
    for box in instances:
        of_teacher = bool((every == box).all(1).any())
        show_boxes(panels[0][0], [box.tolist()], [1], dashed=not of_teacher)
    return save(figure, out, DPI)


def draw_weights(teacher: Any, data: DetectionDataset, indices: Sequence[int], out: Path) -> Path:
    """Images with AID's weight of each."""
    figure, panels = grid(-(-len(indices) // 3), 3, PANEL)
    watcher = Teacher(teacher)
    for axes, index in zip(panels.flat, indices, strict=True):
        losses = watcher(*framed(teacher, data, index), losses=True).losses
        assert losses is not None
        show_image(axes, data.pixels(index), f"teacher's loss {float(losses):.2f}, weight {float((-0.1 * losses).exp()):.3f}")
        show_boxes(axes, data.target(index)["boxes"].tolist(), data.target(index)["labels"].tolist(), dashed=True)
    watcher.close()
    legend(figure, data.classes)
    return save(figure, out, DPI)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args(argv)
    teacher, student = load_detector(given.teacher)[0], load_detector(given.student)[0]
    data = load_dataset(given.data, "kitti")
    order = busiest(data, len(data.items))
    shown = scene(teacher, student, data, order[0])
    draw: dict[str, Callable[[Path], Path]] = {
        "gid": lambda out: draw_instances(shown, out),
        "aid": lambda out: draw_weights(teacher, data, order[:: max(1, len(order) // IMAGES)][:IMAGES], out),
    }
    with torch.no_grad():
        for name, maps in rows(shown, teacher).items():
            draw_maps(shown, maps, given.output / f"{name}.png")
    for name, run in draw.items():
        run(given.output / f"{name}.png")


if __name__ == "__main__":
    main()
