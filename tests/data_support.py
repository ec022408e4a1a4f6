"""Data for the tests of data and evaluation: the real images where they are, else files of the same kind made here."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

CAR = "Car 0.00 0 -1.58 10.00 20.00 29.00 39.00 1.50 1.60 4.00 1.00 1.65 20.00 -1.57"


def line(kind: str = "Car", box: tuple[float, ...] = (10, 20, 29, 39), truncated: float = 0.0, occluded: int = 0) -> str:
    """A KITTI label line."""
    corners = " ".join(f"{v:.2f}" for v in box)
    return f"{kind} {truncated:.2f} {occluded} -1.58 {corners} 1.50 1.60 4.00 1.00 1.65 20.00 -1.57"


def write_image(path: Path, width: int = 64, height: int = 48, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_kitti(root: Path, labels: dict[str, list[str] | None], suffix: str = ".png", size: tuple[int, int] = (64, 48)) -> Path:
    """A KITTI folder with one image per entry; None leaves the label file out."""
    (root / "training" / "label_2").mkdir(parents=True, exist_ok=True)
    (root / "training" / "image_2").mkdir(parents=True, exist_ok=True)
    for number, (name, lines) in enumerate(labels.items()):
        write_image(root / "training" / "image_2" / f"{name}{suffix}", *size, seed=number)
        if lines is not None:
            (root / "training" / "label_2" / f"{name}.txt").write_text("".join(text + "\n" for text in lines))
    return root


def coco_dict(images: int = 1, size: tuple[int, int] = (64, 48)) -> dict:
    """A COCO dictionary with ids that have gaps; image 10, 20, ... of which each holds a car and a dog."""
    numbers = [10 * (i + 1) for i in range(images)]
    return {
        "images": [{"id": n, "file_name": f"{n:06d}.png", "width": size[0], "height": size[1]} for n in numbers],
        "annotations": [
            {"id": 2 * n + k, "image_id": n, "category_id": c, "bbox": [5 + k, 6, 20, 15], "area": 200.0, "iscrowd": 0}
            for n in numbers
            for k, c in enumerate((3, 18))
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }


def write_coco(root: Path, data: dict, images: bool = True, file: str = "annotations.json") -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(data))
    for entry in data["images"] if images else []:
        write_image(root / "images" / entry["file_name"], entry["width"], entry["height"])
    return root


def _shared(name: str) -> Path | None:
    """A folder of the real data, or None with a warning that says so."""
    base = Path(os.environ.get("KDKERNELS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if (base / name).is_dir():
        return base / name
    warnings.warn(f"no real data in {base / name} (set KDKERNELS_DATA): files made by the test are used instead", stacklevel=3)
    return None


def kitti_root(tmp_path: Path) -> Path:
    """The real KITTI frames, or a folder with the same types, full-size boxes and .jpg files."""
    if (real := _shared("kitti101")) is not None:
        return real
    kinds = ("Car", "Pedestrian", "Cyclist", "Van", "Truck", "Tram", "Person_sitting", "Misc", "DontCare")
    labels = {
        f"{i:06d}": [line(kind, (3 * k, k, 3 * k + 9 + i, 30 + k), 0.25 * (k % 3), k % 4) for k, kind in enumerate(kinds)]
        for i in range(12)
    }
    labels["000003"].append(line("Car", (0, 0, 63, 47)))
    labels["000004"] = []
    return write_kitti(tmp_path / "kitti", labels, ".jpg")


def coco_root(tmp_path: Path) -> Path:
    """The real COCO images, or a folder with all of COCO-Traffic's classes, images without boxes and a grey image."""
    if (real := _shared("coco128")) is not None:
        return real
    names = {1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 10: "traffic light",
             11: "fire hydrant", 13: "stop sign", 14: "parking meter", 17: "cat", 18: "dog", 90: "toothbrush"}  # fmt: skip
    data: dict = {"images": [], "annotations": [], "categories": [{"id": n, "name": name} for n, name in names.items()]}
    for i, classes in enumerate(([3, 1], [1], [17, 18], [5, 2, 14], [], [14], [90], [10, 11, 13, 6, 7, 8, 4])):
        data["images"].append({"id": 100 + i, "file_name": f"{100 + i:012d}.jpg", "width": 64, "height": 48})
        for c in classes:
            number = len(data["annotations"]) + 1
            data["annotations"].append(
                {"id": number, "image_id": 100 + i, "category_id": c, "bbox": [c / 2, 3, 12.5, 20], "area": 101.5, "iscrowd": 0}
            )
    write_coco(tmp_path / "coco", data)
    write_image(tmp_path / "coco" / "images" / f"{107:012d}.jpg", mode="L")
    return tmp_path / "coco"
