"""From a folder on disk to a `DetectionDataset`, with every problem in the data reported at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import coco, kitti
from .dataset import DetectionDataset, resized
from .images import Probe, probe_images
from .records import Annotation, BadDataError, Item, Problem
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
        root: KITTI: the folder with `training/image_2` and `training/label_2`. COCO: the JSON file or its folder (`coco.find_coco`).
        format: "kitti", "coco" (any COCO JSON) or "coco-traffic" (the 13 classes of COCO-Traffic and the images that have them).
        split: "train" or "val", or None for all images. COCO's own two files are taken where they are; else it is the seeded 8:2 split.
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
    sources, classes, problems, whole = _kitti(root, mapping) if format == "kitti" else _coco(root, split, format == "coco-traffic")
    if split is not None and whole:
        sources = [sources[i] for i in split_names([source.name for source in sources], split, seed)]
    items = []
    for source, probe in zip(sources, probe_images([source.path for source in sources], verify, progress), strict=True):
        found = _check(source, probe)
        if isinstance(found, list):
            problems += found
        elif not source.bad:
            items.append(found if size is None else resized(found, size))
    return DetectionDataset(items, classes, problems=problems)


@dataclass(frozen=True, slots=True)
class _Source:
    """An image before it is looked at. `size` (width, height) is what the labels say it has, `bad` that problems are known already."""

    path: Path
    name: str
    file_name: str
    image_id: int
    annotate: Callable[[int, int], tuple[list[Annotation], list[Problem]]]
    size: tuple[int, int] | None = None
    bad: bool = False


def _check(source: _Source, probe: Probe) -> Item | list[Problem]:
    """The item, or what is wrong with the image and its labels."""
    if probe.error:
        return [Problem(str(source.path), None, probe.error)]
    if source.size is not None and source.size != (probe.width, probe.height):
        wanted = f"{source.size[0]} x {source.size[1]}"
        return [Problem(str(source.path), None, f"image of {probe.width} x {probe.height} pixels, the annotations say {wanted}")]
    annotations, problems = source.annotate(probe.width, probe.height)
    item = Item(source.path, source.name, source.file_name, source.image_id, probe.width, probe.height, tuple(annotations))
    return problems or item


_Read = tuple[list[_Source], list[str], list[Problem], bool]


def _kitti(root: Path, mapping: str) -> _Read:
    frames, problems = kitti.find_frames(root)
    sources = [_Source(f.image, f.name, f.image.name, f.image_id, partial(kitti.read_labels, f.label, mapping=mapping)) for f in frames]
    return sources, list(kitti.CLASSES), problems, True


def _coco(root: Path, split: str | None, traffic: bool) -> _Read:
    path, is_part = coco.find_coco(root, split)
    parsed = coco.read_coco(path, traffic)
    if isinstance(parsed, list):
        raise BadDataError(parsed)
    locate = coco.ImageFinder(path)
    sources = [
        _Source(locate(i.file_name), i.name, i.file_name, i.image_id, partial(coco.read_annotations, path, i), i.size, i.bad)
        for i in parsed.images
    ]
    return sources, parsed.classes, parsed.problems, not is_part
