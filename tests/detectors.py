"""Small real torchvision detectors, images and targets shared by the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from kdkernels.models import DetectorSpec, build_detector

FAMILIES = ("fcos", "retinanet", "ssdlite", "fasterrcnn")
SIZE = {"min_size": 96, "max_size": 128}


def detector(family: str, seed: int = 0, channels: int = 64, classes: int = 4, **options: object) -> nn.Module:
    """A detector of random weights that depend on `seed` alone, all layers trainable, in training mode; `channels` of its pyramid."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "ssdlite":
            backbone = options.get("backbone", "mobilenet_v3_large")
            return build_detector(DetectorSpec("ssdlite", backbone, classes, min_size=128, max_size=128)).train()
        body = resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
        first = 1 if family == "fasterrcnn" else 2
        layers = {f"layer{i}": str(i - first) for i in range(first, 5)}
        extra = LastLevelMaxPool() if family == "fasterrcnn" else LastLevelP6P7(channels, channels)
        backbone = BackboneWithFPN(body, layers, [64 * 2 ** (i - 1) for i in range(first, 5)], channels, extra)
        kind = {"fcos": FCOS, "retinanet": RetinaNet, "fasterrcnn": FasterRCNN}[family]
        few = {"rpn_post_nms_top_n_train": 64, "box_batch_size_per_image": 32, "rpn_batch_size_per_image": 64}
        return kind(backbone, classes, **{**SIZE, **(few if family == "fasterrcnn" else {}), **options}).train()


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
