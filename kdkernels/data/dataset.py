"""The one dataset class all formats end in, in torchvision's detection conventions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import read_image
from .records import Item, Problem
from .split import names_hash

#: Decoded images are kept in memory when all of them together are not larger than this.
CACHE_BYTES = 1 << 30

Transform = Callable[[Tensor, dict, "torch.Generator | int"], "tuple[Tensor, dict]"]


class DetectionDataset(Dataset):
    """Images with boxes: `ds[i]` is (image, target).

    image: (3, H, W) float32 in 0..1. target: "boxes" (n, 4) float32 xyxy in pixels, "labels" (n,) int64 1..K, "image_id" int,
    "area" (n,) float32, "iscrowd" (n,) int64. Crowds and ignored regions do not train, so a target leaves them out ("iscrowd" is all
    zero); they are in `items` and in `coco()`.

    `ds[i, seed]` applies `transform` with a generator of that seed, so a sampler that yields (index, seed) pairs fixes the augmentation
    whatever the number of workers. `classes` are the names of labels 1..K, `problems` what a loader with `skip_bad` left out.
    """

    def __init__(
        self,
        items: Iterable[Item],
        classes: Sequence[str],
        transform: Transform | None = None,
        cache: bool = True,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.items = list(items)
        self.classes = list(classes)
        self.transform = transform
        self.problems = list(problems)
        small = sum(3 * item.width * item.height for item in self.items) <= CACHE_BYTES
        self._cache: dict[int, np.ndarray] | None = {} if cache and small else None

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, index: int) -> np.ndarray:
        """The image as (H, W, 3) uint8; not to be written to, it may be the cached one."""
        item = self.items[index]
        if self._cache is None:
            return read_image(item.path, (item.height, item.width))
        if item.image_id not in self._cache:
            self._cache[item.image_id] = read_image(item.path, (item.height, item.width))
        return self._cache[item.image_id]

    def target(self, index: int) -> dict[str, Any]:
        """The target of an image without reading the image."""
        item = self.items[index]
        kept = [a for a in item.annotations if a.trains]
        return {
            "boxes": torch.tensor([a.box for a in kept], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([a.label for a in kept], dtype=torch.int64),
            "image_id": item.image_id,
            "area": torch.tensor([a.area for a in kept], dtype=torch.float32),
            "iscrowd": torch.zeros(len(kept), dtype=torch.int64),
        }

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        index, seed = index if isinstance(index, tuple) else (index, None)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        image = torch.from_numpy(self.pixels(index)).permute(2, 0, 1).to(torch.float32).div_(255).contiguous()
        target = self.target(index)
        if seed is not None and self.transform is not None:
            image, target = self.transform(image, target, torch.Generator().manual_seed(seed))
        return image, target

    def coco(self) -> dict[str, Any]:
        """The ground truth as a COCO dictionary, in the pixels that `ds[i]` has."""
        from .coco import to_coco

        return to_coco(self.items, self.classes)

    def subset(self, indices: Iterable[int]) -> DetectionDataset:
        """A dataset of some of the images, in the given order; it shares the decoded images of this one."""
        part = DetectionDataset([self.items[i] for i in indices], self.classes, self.transform, problems=self.problems)
        part._cache = self._cache
        return part

    def with_transform(self, transform: Transform | None) -> DetectionDataset:
        """The same images with another transform for `ds[i, seed]`."""
        part = self.subset(range(len(self)))
        part.transform = transform
        return part

    def hash(self) -> str:
        """SHA-256 of the names of the images: what a run records about its split."""
        return names_hash([item.name for item in self.items])

    def class_counts(self) -> dict[str, int]:
        """How many objects of each class train."""
        counts = [0] * len(self.classes)
        for item in self.items:
            for annotation in item.annotations:
                if annotation.trains:
                    counts[annotation.label - 1] += 1
        return dict(zip(self.classes, counts, strict=True))


def resized(item: Item, size: int | tuple[int, int]) -> Item:
    """The item delivered at another size: (height, width), or an int for the shorter side with the shape kept."""
    if isinstance(size, int):
        scale = size / min(item.width, item.height)
        size = (max(1, round(item.height * scale)), max(1, round(item.width * scale)))
    height, width = size
    sx, sy = width / item.width, height / item.height
    annotations = tuple(
        replace(a, box=(a.box[0] * sx, a.box[1] * sy, a.box[2] * sx, a.box[3] * sy), area=a.area * sx * sy) for a in item.annotations
    )
    return replace(item, width=width, height=height, annotations=annotations)


def collate(batch: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Samples to (list of images, list of targets), as torchvision's detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
