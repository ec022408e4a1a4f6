"""Augmentation on (3, H, W) float images in 0..1 with torchvision targets, driven by a generator so that it can be repeated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

#: Mean and deviation of the normalisation of torchvision's detectors (ImageNet).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The augmentation seed (63 bits) of one sample in one pass over the data; it does not depend on order, batch or process."""
    digest = hashlib.sha256(f"{seed}:{epoch}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def hflip(image: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Mirror an image (3, H, W) left to right, with its boxes (n, 4) xyxy."""
    boxes = target["boxes"]
    width = image.shape[-1]
    flipped = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
    return image.flip(-1), {**target, "boxes": flipped}


@dataclass(frozen=True)
class Augment:
    """Random horizontal flip, contrast and brightness.

    Contrast c and brightness b act on the normalised image z = (x - mean) / std as c z + b, with c from U(contrast) and
    b from U(-brightness, brightness). In image units that is x -> mean + c (x - mean) + b std, per channel with `IMAGE_MEAN` and
    `IMAGE_STD`; the result is clamped to 0..1. Three numbers are drawn in this order whatever the options: flip, c, b.
    """

    flip: float = 0.5
    contrast: tuple[float, float] = (0.75, 1.25)
    brightness: float = 0.3

    def __call__(self, image: Tensor, target: dict, generator: torch.Generator | int) -> tuple[Tensor, dict]:
        """image (3, H, W) float 0..1, target with "boxes" (n, 4): both new, the arguments stay as they are."""
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        flip, c, b = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if flip < self.flip:
            image, target = hflip(image, target)
        low, high = self.contrast
        c = low + (high - low) * c
        b = self.brightness * (2 * b - 1)
        if c != 1 or b != 0:
            mean = image.new_tensor(IMAGE_MEAN)[:, None, None]
            std = image.new_tensor(IMAGE_STD)[:, None, None]
            image = (image * c + (mean * (1 - c) + std * b)).clamp_(0, 1)
        return image, target
