"""Small real torchvision detectors, images and targets shared by the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

FAMILIES = ("fcos", "retinanet", "ssdlite", "fasterrcnn")
SIZE = {"min_size": 96, "max_size": 128}


def detector(family: str, seed: int = 0, backbone: str = "resnet18", classes: int = 4, **options: object) -> nn.Module:
    """A detector of random weights that depend on `seed` alone, with all layers trainable, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "ssdlite":
            return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes, **options).train()
        options = {**SIZE, **options}
        if family == "fasterrcnn":
            return FasterRCNN(resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5), classes, **options).train()
        body = resnet_fpn_backbone(
            backbone_name=backbone, weights=None, trainable_layers=5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
        )
        return {"fcos": FCOS, "retinanet": RetinaNet}[family](body, classes, **options).train()


def batch(images: int = 2, seed: int = 0, classes: int = 4) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of different sizes in 0..1 with three boxes each."""
    generator = torch.Generator().manual_seed(seed)
    pictures, targets = [], []
    for n in range(images):
        height, width = 96, 112 + 8 * n
        pictures.append(torch.rand(3, height, width, generator=generator))
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([width * 0.5, height * 0.5])
        extent = torch.rand(3, 2, generator=generator) * 30 + 14
        targets.append({"boxes": torch.cat([corner, corner + extent], 1), "labels": torch.randint(1, classes, (3,), generator=generator)})
    return pictures, targets
