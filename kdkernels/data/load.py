"""From a folder on disk to a `DetectionDataset`, with every problem in the data reported at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import kitti
from .dataset import DetectionDataset, resized
from .images import probe_images
from .records import BadDataError, Item, Problem
from .split import SPLITS, split_names

FORMATS = ("kitti", "coco", "coco-traffic")

Progress = Callable[[int, int], None]


def load_dataset(
    root: str | Path,
    format: str = "kitti",
    split: str | None = None,
    seed: int = 0,
    mapping: str = "strict",
    skip_bad: bool = False,
    size: int | tuple[int, int] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> DetectionDataset:
    """Read a data set.

    Args:
        root: KITTI: the folder with `training/image_2` and `training/label_2`.
        format: "kitti".
        split: "train" or "val" of the seeded 8:2 split, or None for all images.
        seed: of the split.
        mapping: "strict" or "grouped", KITTI only (`kitti.MAPPINGS`).
        skip_bad: leave out what has problems instead of raising. The image is the item: one bad line drops its image, because an object
            without its label would teach the detector that it is background.
        size: deliver images at (height, width), or with the shorter side of that many pixels; default as they are.
        verify: decode every image first (a file that was cut short is found no other way); False trusts the files' headers.
        progress: called with (images checked, images in all).

    Raises: BadDataError with all problems; FileNotFoundError when `root` does not hold the format; ValueError for bad arguments.
    """
    dataset = _read(Path(root), format, split, seed, mapping, size, verify, progress)
    if dataset.problems and not skip_bad:
        raise BadDataError(dataset.problems)
    return dataset


def _read(
    root: Path,
    format: str,
    split: str | None,
    seed: int,
    mapping: str,
    size: int | tuple[int, int] | None,
    verify: bool,
    progress: Progress | None,
) -> DetectionDataset:
    choices = (("format", format, FORMATS), ("split", split, (None, *SPLITS)), ("mapping", mapping, tuple(kitti.MAPPINGS)))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    items, classes, problems = _read_kitti(root, split, seed, mapping, verify, progress)
    if size is not None:
        items = [resized(item, size) for item in items]
    return DetectionDataset(items, classes, problems=problems)


def _read_kitti(
    root: Path, split: str | None, seed: int, mapping: str, verify: bool, progress: Progress | None
) -> tuple[list[Item], list[str], list[Problem]]:
    frames, problems = kitti.find_frames(root)
    if split is not None:
        frames = [frames[i] for i in split_names([frame.name for frame in frames], split, seed)]
    items = []
    for frame, probe in zip(frames, probe_images([frame.image for frame in frames], verify, progress), strict=True):
        if probe.error:
            problems.append(Problem(str(frame.image), None, probe.error))
            continue
        annotations, found = kitti.read_labels(frame.label, probe.width, probe.height, mapping)
        problems += found
        if not found:
            file_name = f"image_2/{frame.image.name}"
            items.append(Item(frame.image, frame.name, file_name, frame.image_id, probe.width, probe.height, tuple(annotations)))
    return items, list(kitti.CLASSES), problems
