"""KITTI's object detection format: `training/image_2/*.png` and `training/label_2/*.txt` with 15 columns a line.

Columns: type, truncated, occluded, alpha, x1, y1, x2, y2, height, width, length, X, Y, Z, rotation_y (Geiger et al., CVPR 2012, devkit).

Coordinates: KITTI counts pixels from 0 and includes the last one (a box over a whole image 1242 pixels wide is 0..1241). Boxes are read
into continuous coordinates, (x1, y1, x2 + 1, y2 + 1), so that the same box is 0..1242; `kitti_box` takes the pixel off again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .images import IMAGE_SUFFIXES
from .records import Annotation, Problem, fit_box

CLASSES = ["Car", "Pedestrian", "Cyclist"]

#: Every type of the devkit -> class name, or None: a region that is ignored for all classes.
MAPPINGS: dict[str, dict[str, str | None]] = {
    "strict": {
        "Car": "Car", "Pedestrian": "Pedestrian", "Cyclist": "Cyclist",
        "Van": None, "Truck": None, "Tram": None, "Person_sitting": None, "Misc": None, "DontCare": None,
    },
    "grouped": {
        "Car": "Car", "Van": "Car", "Truck": "Car", "Tram": "Car",
        "Pedestrian": "Pedestrian", "Person_sitting": "Pedestrian", "Cyclist": "Cyclist",
        "Misc": None, "DontCare": None,
    },
}  # fmt: skip

COLUMNS = 15


@dataclass(frozen=True, slots=True)
class Frame:
    """One image of the folder and the label file that belongs to it. `image_id` counts from 1 in the order of names."""

    name: str
    image_id: int
    image: Path
    label: Path


def kitti_box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A continuous box in KITTI's pixel-inclusive coordinates."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def find_frames(root: Path) -> tuple[list[Frame], list[Problem]]:
    """The frames under `root` (the folder that holds `training/`, or `training` itself), and what is wrong with the folder.

    Label files without an image and two images of one name are problems. Raises FileNotFoundError when the two folders are not there.
    """
    base = root / "training" if (root / "training").is_dir() else root
    image_dir, label_dir = base / "image_2", base / "label_2"
    for folder in (image_dir, label_dir):
        if not folder.is_dir():
            raise FileNotFoundError(f"no KITTI data in {root}: {folder} is not a folder (wanted: training/image_2 and training/label_2)")
    images: dict[str, Path] = {}
    problems = []
    for path in sorted(image_dir.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in images:
            problems.append(Problem(str(path), None, f"second image of the name {path.stem} (the first: {images[path.stem].name})"))
        else:
            images[path.stem] = path
    labels = {path.stem: path for path in sorted(label_dir.glob("[!.]*.txt"))}
    problems += [Problem(str(path), None, "label file without an image") for name, path in labels.items() if name not in images]
    frames = [
        Frame(name, number, path, labels.get(name, label_dir / f"{name}.txt"))
        for number, (name, path) in enumerate(sorted(images.items()), start=1)
    ]
    return frames, problems


def read_labels(path: Path, width: int, height: int, mapping: str = "strict") -> tuple[list[Annotation], list[Problem]]:
    """The annotations of one label file for an image of width x height pixels, and every problem in it.

    Types that the mapping gives no class become regions ignored for all classes (label 0). An empty file is an image without objects.
    """
    file = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "label file is missing" if isinstance(error, FileNotFoundError) else f"label file cannot be read ({error})"
        return [], [Problem(file, None, reason)]
    annotations: list[Annotation] = []
    problems: list[Problem] = []
    for number, raw in enumerate(data.splitlines(), start=1):
        if not raw.strip():
            continue
        parsed = _parse_line(raw, width, height, mapping)
        if isinstance(parsed, str):
            problems.append(Problem(file, number, parsed))
        else:
            annotations.append(parsed)
    return annotations, problems


def _parse_line(raw: bytes, width: int, height: int, mapping: str) -> Annotation | str:
    """One label line, or the reason why it is bad."""
    try:
        columns = raw.decode("utf-8-sig").split()
    except UnicodeDecodeError:
        return "not UTF-8 text"
    if len(columns) != COLUMNS:
        return f"{len(columns)} columns, {COLUMNS} wanted" + (" (a 16th, the score, belongs to result files)" if len(columns) == 16 else "")
    kind, types = columns[0], MAPPINGS[mapping]
    if kind not in types:
        return f"unknown class {kind!r} (known: {', '.join(types)})"
    values = []
    for position, text in enumerate(columns[1:], start=2):
        try:
            values.append(float(text))
        except ValueError:
            return f"column {position} is not a number: {text!r}"
        if not math.isfinite(values[-1]):
            return f"column {position} is {text}"
    truncated, occluded, _, x1, y1, x2, y2 = values[:7]
    if x2 <= x1 or y2 <= y1:
        return f"box without area ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    box, reason = fit_box((x1, y1, x2 + 1, y2 + 1), width, height)
    if box is None:
        return reason
    name = types[kind]
    area = (box[2] - box[0]) * (box[3] - box[1])
    label = 0 if name is None else CLASSES.index(name) + 1
    return Annotation(box, label, area, ignore=name is None, truncated=truncated, occluded=int(occluded), type=kind)
