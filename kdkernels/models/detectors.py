"""`build_detector`: a DetectorSpec becomes an unmodified torchvision detector."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

from .backbones import build_backbone, image_statistics, torchvision_body
from .distribution import DistributionRegression
from .spec import DetectorSpec


def build_detector(spec: DetectorSpec, pretrained: bool | None = None) -> nn.Module:
    """The torchvision detector (FCOS, RetinaNet, SSD or FasterRCNN) that `spec` describes.

    Images are lists of (3, H, W) in 0..1. `pretrained` overrides `spec.pretrained`: False when a checkpoint is loaded anyway.
    The weights are drawn from torch's global generator, so `torch.manual_seed` before the call makes them reproducible.
    """
    spec = (spec if pretrained is None else replace(spec, pretrained=pretrained)).resolved()
    return {"fcos": _fcos, "retinanet": _retinanet, "fasterrcnn": _faster_rcnn, "ssdlite": _ssdlite}[spec.detector](spec)


def _resize(spec: DetectorSpec) -> dict[str, object]:
    mean, std = image_statistics(spec.backbone)
    return {"min_size": spec.min_size, "max_size": spec.max_size, "image_mean": mean, "image_std": std}


def _post(spec: DetectorSpec) -> dict[str, object]:
    return {"score_thresh": spec.score_thresh, "nms_thresh": spec.nms_thresh, "detections_per_img": spec.detections}


def _strides(spec: DetectorSpec) -> list[int]:
    return [8 * 2**i for i in range(spec.levels or 0)]


def _fcos(spec: DetectorSpec) -> FCOS:
    anchors = AnchorGenerator(tuple((s,) for s in _strides(spec)), ((1.0,),) * len(_strides(spec)))
    head = FCOSHead(spec.neck_channels, 1, spec.num_classes, spec.head_convs)
    if spec.reg_max is not None:
        head.regression_head.bbox_reg = DistributionRegression(head.regression_head.bbox_reg, spec.reg_max)
    return FCOS(build_backbone(spec), spec.num_classes, anchor_generator=anchors, head=head, **_resize(spec), **_post(spec))


def _retinanet(spec: DetectorSpec) -> RetinaNet:
    assert spec.anchor_scale is not None and spec.neck_channels is not None  # resolved
    sides = [s * spec.anchor_scale for s in _strides(spec)]
    sizes = tuple(tuple(int(side * 2 ** (k / 3)) for k in range(3)) for side in sides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    norm = partial(nn.GroupNorm, 32) if spec.neck_norm and spec.neck_channels % 32 == 0 else None
    head = RetinaNetHead(spec.neck_channels, anchors.num_anchors_per_location()[0], spec.num_classes, norm_layer=norm)
    for tower in (head.classification_head, head.regression_head):
        tower.conv = tower.conv[: spec.head_convs]
    return RetinaNet(build_backbone(spec), spec.num_classes, anchor_generator=anchors, head=head, **_resize(spec), **_post(spec))


def _faster_rcnn(spec: DetectorSpec) -> FasterRCNN:
    assert spec.anchor_scale is not None and spec.proposals is not None  # resolved
    sizes = tuple((int(s * spec.anchor_scale),) for s in (4, 8, 16, 32, 64))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    rois = {f"box_{k}": v for k, v in _post(spec).items()} | {"box_batch_size_per_image": spec.rois}
    for when, boxes in {"train": 2 * spec.proposals, "test": spec.proposals}.items():
        rois |= {f"rpn_{side}_nms_top_n_{when}": boxes for side in ("pre", "post")}
    pool = MultiScaleRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    model = FasterRCNN(build_backbone(spec), spec.num_classes, rpn_anchor_generator=anchors, box_roi_pool=pool, **_resize(spec), **rois)
    if spec.reg_max is not None:
        model.rpn.head.bbox_pred = DistributionRegression(model.rpn.head.bbox_pred, spec.reg_max, symmetric=True)
    return model


def _ssdlite(spec: DetectorSpec) -> SSD:
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)
    features = torchvision_body(spec.backbone, spec.pretrained, norm_layer=norm).features
    # C4 is the last block that starts a stage: its expansion is the first map of SSDlite (stride 16).
    c4 = [i for i, block in enumerate(features) if getattr(block, "_is_cn", False)][-1]
    backbone = SSDLiteFeatureExtractorMobileNet(features, c4, norm)
    size = (spec.max_size, spec.min_size)
    channels = detection_utils.retrieve_out_channels(backbone, size)
    anchors = DefaultBoxGenerator([[2, 3] for _ in channels], min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), spec.num_classes, norm)
    half = [0.5] * 3
    mean, std = image_statistics(spec.backbone) if spec.pretrained else (half, half)
    return SSD(backbone, anchors, size, spec.num_classes, head=head, image_mean=mean, image_std=std, topk_candidates=300, **_post(spec))
