"""torchvision's detectors: FCOS, RetinaNet, SSD / SSDlite and Faster R-CNN."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from kdkernels.integrations.protocol import TaskLosses
from kdkernels.integrations.torchvision_heads import DenseHead, RegionProposalHead, SoftmaxHead
from kdkernels.losses.aid import PARTS
from kdkernels.tap import Features, unwrap

Targets = list[dict[str, Tensor]]
#: A torchvision detector. torch types every part of a module as a Tensor or a Module, so that no part of it could be called.
Detector = Any


class TorchvisionAdapter(ABC):
    """What the families share: one transform, a backbone that gives all levels, a head on top."""

    default_tap = "backbone"
    frame_module = "transform"
    excluded_levels: tuple[str, ...] = ()

    def losses(self, model: Detector, images: Any, targets: Targets) -> dict[str, Tensor]:
        """Losses of raw images by the model itself, or of a transformed ImageList by its parts."""
        if isinstance(images, ImageList):
            return self.head_losses(model, images, self.features(model, images), targets)
        if not model.training:
            raise ValueError(f"{type(unwrap(model)).__name__} is in eval mode and gives detections: call .train() before distilling")
        return model(images, targets)

    @abstractmethod
    def head_losses(self, model: Detector, images: ImageList, features: Features, targets: Targets) -> TaskLosses:
        """The losses of a transformed batch from its features; each family has its own."""

    @abstractmethod
    def per_image_parts(self, model: Detector, losses: TaskLosses, per_level: bool) -> dict[str, Tensor]:
        """AID's terms of "classification" and of "regression", each (N,), or (L, N) with `per_level`."""

    def per_image_losses(self, model: Detector, losses: TaskLosses, per_level: bool) -> Tensor:
        parts = self.per_image_parts(model, losses, per_level)
        return parts["classification"] + parts["regression"]

    def features(self, model: Detector, images: ImageList) -> Features:
        features = model.backbone(images.tensors)
        return OrderedDict([("0", features)]) if isinstance(features, Tensor) else features

    def frame(self, model: Detector, images: ImageList, targets: Targets) -> tuple[Tensor, Tensor, tuple[int, int]]:
        counts = [len(target["boxes"]) for target in targets]
        boxes = images.tensors.new_zeros((len(targets), max(counts, default=0), 4), dtype=torch.float32)
        for padded, target in zip(boxes, targets, strict=True):
            padded[: len(target["boxes"])] = target["boxes"]
        height, width = images.tensors.shape[-2:]
        return boxes, torch.tensor(counts, device=boxes.device), (height, width)

    def teacher_images(self, student: Detector, teacher: Detector, images: ImageList) -> ImageList:
        """The student's transformed batch in the teacher's normalisation (the padding, 0 in both, stays 0)."""
        bare: list[Detector] = [unwrap(student), unwrap(teacher)]
        ours, theirs = (model.transform for model in bare)
        if list(ours.image_mean) == list(theirs.image_mean) and list(ours.image_std) == list(theirs.image_std):
            return images
        batch = images.tensors
        statistics = (ours.image_std, ours.image_mean, theirs.image_mean, theirs.image_std)
        std, mean, new_mean, new_std = (batch.new_tensor(values)[:, None, None] for values in statistics)
        renormalised = batch.new_zeros(batch.shape)
        for target, image, (height, width) in zip(renormalised, batch, images.image_sizes, strict=True):
            target[:, :height, :width] = (image[:, :height, :width] * std + mean - new_mean) / new_std
        return ImageList(renormalised, images.image_sizes)


class _OneStage(NamedTuple):
    targets: Targets
    head: dict[str, Tensor]
    anchors: list[Tensor]
    matched: list[Tensor]
    anchors_per_level: list[int]


class _MatchOnly:
    """Stands in for a detector whose own compute_loss is asked for its anchor matching: as `head` it hands the matching back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.head = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def compute_loss(self, targets: Targets, head: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]) -> list[Tensor]:
        return matched


class OneStageAdapter(DenseHead, TorchvisionAdapter):
    """FCOS and RetinaNet: the loss of a slice of the head's outputs is the head's own loss function on that slice.

    AID's terms are classification and box regression (centerness excluded). D_n has image n's own normaliser, the number of
    its foreground anchors; D_ln is the share of level l's anchors with that same normaliser.
    """

    @staticmethod
    def supports(model: nn.Module) -> bool:
        return isinstance(model, FCOS | RetinaNet)

    def head_losses(self, model: Detector, images: ImageList, features: Features, targets: Targets) -> TaskLosses:
        levels = list(features.values())
        head = model.head(levels)
        anchors = model.anchor_generator(images, levels)
        matched = self.match(model, targets, anchors, levels)
        outputs = _OneStage(targets, head, anchors, matched, self.anchors_per_level(model, levels))
        return TaskLosses(self.loss(model, outputs), outputs)

    def anchors_per_level(self, model: Detector, levels: list[Tensor]) -> list[int]:
        per_cell = model.anchor_generator.num_anchors_per_location()
        return [x.shape[-2] * x.shape[-1] * count for x, count in zip(levels, per_cell, strict=True)]

    def match(self, model: Detector, targets: Targets, anchors: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
        """Index of the ground-truth box of each anchor, negative for background."""
        extra = (self.anchors_per_level(model, levels),) if isinstance(model, FCOS) else ()
        return type(model).compute_loss(_MatchOnly(model), targets, {}, anchors, *extra)

    def loss(self, model: Detector, o: _OneStage) -> dict[str, Tensor]:
        return model.head.compute_loss(o.targets, o.head, o.anchors, o.matched)

    @torch.no_grad()
    def per_image_parts(self, model: Detector, losses: TaskLosses, per_level: bool) -> dict[str, Tensor]:
        model, o = unwrap(model), losses.outputs
        images = range(len(o.targets))
        if per_level:
            return _by_name(torch.stack([self._level_losses(model, o, n) for n in images], dim=2))
        return _by_name(torch.stack([_both(self.loss(model, _slice(o, n, slice(None)))) for n in images], dim=1))

    def _level_losses(self, model: Detector, o: _OneStage, n: int) -> Tensor:
        """(2, L): classification and regression of image n, level by level."""
        foreground = (o.matched[n] >= 0).sum().clamp(min=1)
        parts, start = [], 0
        for count in o.anchors_per_level:
            level = slice(start, start + count)
            own = (o.matched[n][level] >= 0).sum().clamp(min=1)
            parts.append(_both(self.loss(model, _slice(o, n, level))) * own / foreground)
            start += count
        return torch.stack(parts, dim=1)

    def detections(self, model: Detector, images: ImageList, features: Features) -> Targets:
        levels = list(features.values())
        head = model.head(levels)
        anchors = model.anchor_generator(images, levels)
        counts = self.anchors_per_level(model, levels)
        split = {key: list(value.split(counts, dim=1)) for key, value in head.items()}
        return model.postprocess_detections(split, [list(a.split(counts)) for a in anchors], images.image_sizes)


def _slice(o: _OneStage, n: int, level: slice) -> _OneStage:
    head = {key: value[n : n + 1, level] for key, value in o.head.items()}
    return _OneStage([o.targets[n]], head, [o.anchors[n][level]], [o.matched[n][level]], [])


def _both(losses: dict[str, Tensor]) -> Tensor:
    """(2,): classification and regression."""
    return torch.stack([losses["classification"].float(), losses["bbox_regression"].float()])


def _by_name(both: Tensor) -> dict[str, Tensor]:
    return dict(zip(PARTS, both, strict=True))


class SSDAdapter(SoftmaxHead, OneStageAdapter):
    """SSD and SSDlite. Hard negatives are mined per image over all levels, so D_ln sums the per-anchor losses of level l."""

    @staticmethod
    def supports(model: nn.Module) -> bool:
        return isinstance(model, SSD)

    def match(self, model: Detector, targets: Targets, anchors: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
        return [
            model.proposal_matcher(box_iou(target["boxes"], a)) if len(target["boxes"]) else a.new_full((len(a),), -1, dtype=torch.int64)
            for target, a in zip(targets, anchors, strict=True)
        ]

    def loss(self, model: Detector, o: _OneStage) -> dict[str, Tensor]:
        return model.compute_loss(o.targets, o.head, o.anchors, o.matched)

    def _level_losses(self, model: Detector, o: _OneStage, n: int) -> Tensor:
        matched, logits = o.matched[n], o.head["cls_logits"][n].float()
        positive = matched >= 0
        labels = torch.zeros_like(matched)
        labels[positive] = o.targets[n]["labels"][matched[positive]]
        classification = F.cross_entropy(logits, labels, reduction="none")
        negatives = int(model.neg_to_pos_ratio * positive.sum())
        order = classification.masked_fill(positive, -torch.inf).argsort(descending=True)
        mined = positive.clone()
        mined[order[:negatives]] = True
        encoded = model.box_coder.encode_single(o.targets[n]["boxes"][matched[positive]], o.anchors[n][positive])
        regression = torch.zeros_like(classification)
        regression[positive] = F.smooth_l1_loss(o.head["bbox_regression"][n][positive].float(), encoded, reduction="none").sum(1)
        per_anchor = torch.stack([torch.where(mined, classification, 0.0), regression])
        return torch.stack([part.sum(1) for part in per_anchor.split(o.anchors_per_level, 1)], dim=1) / positive.sum().clamp(min=1)

    def detections(self, model: Detector, images: ImageList, features: Features) -> Targets:
        levels = list(features.values())
        return model.postprocess_detections(model.head(levels), model.anchor_generator(images, levels), images.image_sizes)


class _TwoStage(NamedTuple):
    objectness: Tensor
    deltas: Tensor
    labels: list[Tensor]
    regression: list[Tensor]
    anchors_per_level: list[int]
    class_logits: Tensor
    box_regression: Tensor
    roi_labels: list[Tensor]
    roi_regression: list[Tensor]


class FasterRCNNAdapter(RegionProposalHead, TorchvisionAdapter):
    """Faster R-CNN: all four losses enter AID. RoI terms have no level, so they go in full to every level, as released.

    The anchors that the RPN samples for its loss are drawn once; batch, images and levels share them.
    """

    excluded_levels = ("pool",)

    @staticmethod
    def supports(model: nn.Module) -> bool:
        return isinstance(model, FasterRCNN) and not isinstance(model, MaskRCNN | KeypointRCNN)

    def head_losses(self, model: Detector, images: ImageList, features: Features, targets: Targets) -> TaskLosses:
        rpn, roi = model.rpn, model.roi_heads
        levels = list(features.values())
        objectness, deltas = rpn.head(levels)
        anchors = rpn.anchor_generator(images, levels)
        per_level = [o[0].numel() for o in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, per_level)
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        regression = list(rpn.box_coder.encode(matched, anchors))
        # Unsampled anchors are marked "ignore": sampling again inside rpn.compute_loss then finds exactly the ones drawn here.
        positive, negative = rpn.fg_bg_sampler(labels)
        labels = [torch.where((p | q).bool(), label, -1.0) for label, p, q in zip(labels, positive, negative, strict=True)]
        loss_objectness, loss_rpn_box = rpn.compute_loss(objectness, deltas, labels, regression)

        proposals, _, roi_labels, roi_regression = roi.select_training_samples(proposals, targets)
        pooled = roi.box_head(roi.box_roi_pool(features, proposals, images.image_sizes))
        class_logits, box_regression = roi.box_predictor(pooled)
        loss_classifier, loss_box = fastrcnn_loss(class_logits, box_regression, roi_labels, list(roi_regression))
        losses = {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box,
            "loss_objectness": loss_objectness,
            "loss_rpn_box_reg": loss_rpn_box,
        }
        outputs = _TwoStage(
            objectness.flatten(), deltas, labels, regression, per_level, class_logits, box_regression, roi_labels, list(roi_regression)
        )
        return TaskLosses(losses, outputs)

    @torch.no_grad()
    def per_image_parts(self, model: Detector, losses: TaskLosses, per_level: bool) -> dict[str, Tensor]:
        model, o = unwrap(model), losses.outputs
        roi_counts = [len(labels) for labels in o.roi_labels]
        roi_parts = zip(o.class_logits.split(roi_counts), o.box_regression.split(roi_counts), o.roi_labels, o.roi_regression, strict=True)
        found = [torch.stack(fastrcnn_loss(logits, boxes, [labels], [target])) for logits, boxes, labels, target in roi_parts]
        roi = torch.stack(found, dim=1)
        rpn = torch.stack([self._rpn_losses(model, o, n) for n in range(len(o.labels))], dim=2)
        return _by_name(rpn + roi[:, None] if per_level else rpn.sum(1) + roi)

    def _rpn_losses(self, model: Detector, o: _TwoStage, n: int) -> Tensor:
        """(2, L): objectness and regression of image n, level by level."""
        anchors = len(o.labels[n])
        image = slice(n * anchors, (n + 1) * anchors)
        sampled = (o.labels[n] >= 0).sum().clamp(min=1)
        parts = []
        columns = (o.objectness[image], o.deltas[image], o.labels[n], o.regression[n])
        for objectness, deltas, labels, regression in zip(*(column.split(o.anchors_per_level) for column in columns), strict=True):
            own = (labels >= 0).sum()
            if own == 0:
                parts.append(objectness.new_zeros(2, dtype=torch.float32))
                continue
            both = model.rpn.compute_loss(objectness[:, None], deltas, [labels], [regression])
            parts.append(torch.stack([loss.float() for loss in both]) * own / sampled)
        return torch.stack(parts, dim=1)

    def detections(self, model: Detector, images: ImageList, features: Features) -> Targets:
        training = model.rpn.training, model.roi_heads.training
        model.rpn.training = model.roi_heads.training = False
        try:
            proposals, _ = model.rpn(images, features)
            found, _ = model.roi_heads(features, proposals, images.image_sizes)
        finally:
            model.rpn.training, model.roi_heads.training = training
        return found


FAMILIES = (OneStageAdapter, SSDAdapter, FasterRCNNAdapter)
