"""Random images with boxes in torchvision's form, so that the examples run without a data set."""

from collections.abc import Iterator

import torch

Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]


def random_batches(count: int, size: int, images: int = 2, classes: int = 4) -> Iterator[Batch]:
    """`count` batches of `images` pictures of size x 1.5 size pixels with two boxes each, labels 1 to classes - 1."""
    width = size * 3 // 2
    for _ in range(count):
        corners = torch.rand(images, 2, 2) * torch.tensor([width / 2, size / 2])
        boxes = torch.cat([corners, corners + size / 4], dim=2)
        targets = [{"boxes": b, "labels": torch.randint(1, classes, (2,))} for b in boxes]
        yield [torch.rand(3, size, width) for _ in range(images)], targets
