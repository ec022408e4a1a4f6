"""COCO's JSON format, read and written, and the COCO-Traffic subset."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import Annotation, Item, Problem, fit_box

#: The 13 classes of COCO-Traffic in COCO's order (AID `configs/_base_/datasets/CocoTraffic_detection.py`).
TRAFFIC_CLASSES = [
    "person", "bicycle", "car", "motorcycle", "bus", "train", "truck",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "cat", "dog",
]  # fmt: skip

#: An image belongs to COCO-Traffic when it has one of these (GKD `filter_traffic.py`: ids 2, 3, 4, 6, 7, 8, 10, 11, 13).
TRAFFIC_SELECTS = frozenset(TRAFFIC_CLASSES) - {"person", "parking meter", "cat", "dog"}


@dataclass(slots=True)
class CocoImage:
    """One entry of "images" with the raw annotations that name it."""

    name: str
    image_id: int
    file_name: str
    path: Path
    width: int
    height: int
    annotations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)


@dataclass(slots=True)
class CocoFile:
    """A parsed JSON file: images, class names in the order of labels, category id -> label, and what is wrong with it."""

    path: Path
    images: list[CocoImage]
    classes: list[str]
    labels: dict[int, int]
    problems: list[Problem]


def to_coco(items: Iterable[Item], classes: Sequence[str]) -> dict[str, Any]:
    """Items as a COCO dictionary: category, annotation and (as given) image ids from 1, boxes xywh.

    Crowds and ignored regions get `iscrowd` 1, since pycocotools overwrites `ignore` by it; a region that is ignored for all classes is
    written once per class, since matching is per class. `truncated`, `occluded` and `type` are extra keys where they are known.
    """
    images, annotations = [], []
    for item in items:
        images.append({"id": item.image_id, "file_name": item.file_name, "width": item.width, "height": item.height})
        for a in item.annotations:
            x1, y1, x2, y2 = a.box
            entry: dict[str, Any] = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": a.area, "iscrowd": int(not a.trains)}
            if a.ignore:
                entry["ignore"] = 1
            entry.update({k: v for k in ("truncated", "occluded", "type") if (v := getattr(a, k)) is not None})
            for label in [a.label] if a.label else range(1, len(classes) + 1):
                annotations.append({"id": len(annotations) + 1, "image_id": item.image_id, "category_id": label, **entry})
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def annotation_from(entry: dict[str, Any], label: int, width: int, height: int) -> Annotation | str:
    """One COCO annotation as ours, or the reason why it is bad. `ignore` counts as a crowd: it neither trains nor is counted."""
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        return f"bbox {bbox!r} is not four numbers"
    if not all(math.isfinite(v) for v in bbox):
        return f"bbox {bbox!r} is not finite"
    x, y, w, h = (float(v) for v in bbox)
    if w <= 0 or h <= 0:
        return f"box without area (bbox {bbox!r})"
    box, reason = fit_box((x, y, x + w, y + h), width, height)
    if box is None:
        return reason
    area = entry.get("area")
    if area is None:
        area = (box[2] - box[0]) * (box[3] - box[1])
    if not _is_number(area) or not math.isfinite(area) or area < 0:
        return f"area {area!r} is not a number >= 0"
    extra = {k: entry[k] for k in ("truncated", "occluded", "type") if k in entry}
    return Annotation(box, label, float(area), iscrowd=bool(entry.get("iscrowd", 0)), ignore=bool(entry.get("ignore", 0)), **extra)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_json(path: Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The dictionary in a file, or why there is none."""
    try:
        data = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        return None, [Problem(str(path), error.lineno, f"no JSON: {error.msg}")]
    except (OSError, UnicodeDecodeError) as error:
        return None, [Problem(str(path), None, f"annotation file cannot be read ({error})")]
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(data, dict) or not isinstance(data.get(k), list)]
    if missing:
        return None, [Problem(str(path), None, f"no COCO file: the list {missing[0]!r} is missing")]
    return data, []
