"""COCO's JSON format, read and written, and the COCO-Traffic subset."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
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
    """One entry of "images" with the annotations that name it: (position in the file, entry, label). `bad` says that it has problems."""

    image_id: int
    file_name: str
    size: tuple[int, int] | None
    annotations: list[tuple[int, dict[str, Any], int]] = field(default_factory=list)
    bad: bool = False

    @property
    def name(self) -> str:
        """The file's name without its ending, which a split hashes."""
        return PurePosixPath(self.file_name).with_suffix("").as_posix()


@dataclass(slots=True)
class CocoFile:
    """A parsed JSON file: its images in order of ids, class names in the order of labels, and what is wrong with it."""

    path: Path
    images: list[CocoImage]
    classes: list[str]
    problems: list[Problem]


def to_coco(items: Iterable[Item], classes: Sequence[str]) -> dict[str, Any]:
    """Items as a COCO dictionary: category, annotation and (as given) image ids from 1, boxes xywh.

    Crowds and ignored regions get `iscrowd` 1, since pycocotools overwrites `ignore` by it; a region that is ignored for all classes is
    written once per class, since matching is per class. `truncated`, `occluded` and `type` are extra keys where they are known.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
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
    return Annotation(box, label, float(area), iscrowd=bool(entry.get("iscrowd", 0)), ignore=bool(entry.get("ignore", 0)), **_extra(entry))


def _extra(entry: dict[str, Any]) -> dict[str, Any]:
    """KITTI's extra keys where they hold what we write into them."""
    extra: dict[str, Any] = {}
    for key, kind in (("truncated", float), ("occluded", int)):
        value = entry.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            extra[key] = kind(value)
    if isinstance(entry.get("type"), str):
        extra["type"] = entry["type"]
    return extra


def read_annotations(file: Path, image: CocoImage, width: int, height: int) -> tuple[list[Annotation], list[Problem]]:
    """The annotations of one image of width x height pixels, and every problem in them."""
    annotations, problems = [], []
    for position, entry, label in image.annotations:
        found = annotation_from(entry, label, width, height)
        if isinstance(found, str):
            problems.append(Problem(str(file), None, f"annotations[{position}] (id {entry.get('id')}, image {image.image_id}): {found}"))
        else:
            annotations.append(found)
    return annotations, problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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


def read_coco(path: Path, traffic: bool = False) -> CocoFile | list[Problem]:
    """Parse a COCO file and check its ids and references; boxes are checked by `read_annotations`.

    Labels are 1..K in the order of category ids (with `traffic`: the 13 classes, found by name, and the images that they select). A list
    of problems alone means that nothing of the file can be used.
    """
    data, problems = parse_json(path)
    if data is None:
        return problems

    def bad(reason: str) -> None:
        problems.append(Problem(str(path), None, reason))

    names: dict[int, str] = {}
    for position, entry in enumerate(data["categories"]):
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            bad(f"categories[{position}] has no whole number 'id' and text 'name'")
        elif entry["id"] in names or entry["name"] in names.values():
            bad(f"categories[{position}] repeats the id {entry['id']} or the name {entry['name']!r}")
        else:
            names[entry["id"]] = entry["name"]
    if traffic and (absent := [name for name in TRAFFIC_CLASSES if name not in names.values()]):
        return [*problems, Problem(str(path), None, f"COCO-Traffic needs the categories {', '.join(absent)}")]
    classes = list(TRAFFIC_CLASSES) if traffic else [names[number] for number in sorted(names)]
    labels = {number: classes.index(name) + 1 for number, name in names.items() if name in classes}

    images: dict[int, CocoImage] = {}
    for position, entry in enumerate(data["images"]):
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            bad(f"images[{position}] has no whole number 'id' and text 'file_name'")
        elif entry["id"] in images:
            bad(f"images[{position}] repeats the id {entry['id']}")
            images[entry["id"]].bad = True
        else:
            size = (entry.get("width"), entry.get("height"))
            images[entry["id"]] = CocoImage(entry["id"], entry["file_name"], size if _is_id(size[0]) and _is_id(size[1]) else None)  # type: ignore[arg-type]
    _attach(data["annotations"], images, names, labels, bad)
    chosen = [images[number] for number in sorted(images)]
    if traffic:
        selecting = {classes.index(name) + 1 for name in TRAFFIC_SELECTS}
        chosen = [image for image in chosen if any(label in selecting for _, _, label in image.annotations)]
    return CocoFile(path, chosen, classes, problems)


def _attach(
    entries: list[Any], images: dict[int, CocoImage], names: dict[int, str], labels: dict[int, int], bad: Callable[[str], None]
) -> None:
    """Give every annotation of a class in `labels` to its image; an annotation with a problem makes its image bad."""
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        where = f"annotations[{position}]"
        if not isinstance(entry, dict):
            bad(f"{where} is no object")
            continue
        where += f" (id {entry.get('id')})"
        image = images.get(entry["image_id"]) if _is_id(entry.get("image_id")) else None
        reason = ""
        if image is None:
            reason = f"names the image {entry.get('image_id')!r}, which is not in the file"
        elif not _is_id(entry.get("id")):
            reason = "has an id that is no whole number"
        elif entry["id"] in seen:
            reason = "repeats an id"
        elif not _is_id(entry.get("category_id")) or entry["category_id"] not in names:
            reason = f"is of an unknown class: category {entry.get('category_id')!r}"
        if reason:
            bad(f"{where} {reason}")
            if image is not None:
                image.bad = True
            continue
        seen.add(entry["id"])
        if image is not None and entry["category_id"] in labels:
            image.annotations.append((position, entry, labels[entry["category_id"]]))


def find_coco(root: Path, split: str | None = None) -> tuple[Path, bool]:
    """The JSON file of a data set, and whether it holds one part of a split already (COCO's instances_train*.json, instances_val*.json).

    `root` is the file itself, or a folder with annotations.json, or with one file (or COCO's files) in annotations/ or directly in it.
    Raises FileNotFoundError when there is none, ValueError when there are several.
    """
    if root.is_file():
        return root, False
    if (root / "annotations.json").is_file():
        return root / "annotations.json", False
    found = sorted(root.glob("annotations/*.json")) or sorted(root.glob("*.json"))
    found = [path for path in found if path.name.startswith("instances")] or found
    parts = [path for path in found if split is not None and path.name.startswith(f"instances_{split}")]
    if len(parts) == 1 and len(found) > 1:
        return parts[0], True
    if not found:
        raise FileNotFoundError(f"no COCO data in {root}: neither annotations.json nor a .json file in annotations/")
    if len(found) > 1:
        raise ValueError(f"several annotation files in {root} ({', '.join(path.name for path in found)}): name the one to read")
    return found[0], False


class ImageFinder:
    """Where the images of a JSON file lie: next to it, or in images/, in a folder named like the file's ending (train2017), in KITTI's."""

    def __init__(self, file: Path) -> None:
        bases = [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
        part = file.stem.rpartition("_")[2]
        self.folders = [base / sub for base in bases for sub in ("images", f"images/{part}", part, "image_2", "training/image_2", ".")]

    def __call__(self, file_name: str) -> Path:
        """The path of an image; where there is no such file, where it should have been."""
        for position, folder in enumerate(self.folders):
            if (path := folder / file_name).is_file():
                self.folders.insert(0, self.folders.pop(position))  # the next ones are likely there too
                return path
        return self.folders[0] / file_name
