"""The dense heads of torchvision's detectors: their outputs as `HeadOutputs`, and a teacher's head on a student's head features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder

from kdkernels.head import HeadRecord, align_statistics
from kdkernels.losses.trainable import as_parameters
from kdkernels.models.distribution import DistributionRegression
from kdkernels.outputs import HeadOutputs
from kdkernels.pyramid import accumulate

#: Of a detector or of a part of one, see integrations/torchvision.py.
Module = Any


class Tower(NamedTuple):
    """The convolutions of a branch, cut in front of the last one (of four, as CrossKD was released).

    held: what gives the features at the cut, before their activation; None where there is nothing in front of the cut
    tail: the modules behind it
    """

    held: nn.Module | None
    tail: list[nn.Module]


def cut(tower: nn.Module) -> Tower:
    blocks: list[list[nn.Module]] = []
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            blocks.append([])
        if not any(True for _ in module.children()) and blocks:
            blocks[-1].append(module)
    held = blocks[-2][-2] if len(blocks) > 1 else None
    return Tower(held, blocks[-1] if blocks else [])


def rows(maps: Tensor, columns: int) -> Tensor:
    """(N, A * columns, H, W) as (N, H * W * A, columns), in the order of torchvision's anchors."""
    n, channels, height, width = maps.shape
    apart = maps.reshape(n, channels // columns, columns, height, width).permute(0, 3, 4, 1, 2)
    return apart.reshape(n, height * width * (channels // columns), columns)


def decode(coder: Any, codes: Tensor, anchors: Tensor) -> Tensor:
    """Regressed numbers (N, A, 4) of anchors (A, 4) as boxes, in fp32 (fp64 for fp64)."""
    codes = accumulate(codes)
    if isinstance(coder, BoxLinearCoder):
        return coder.decode(codes, anchors)
    return coder.decode_single(codes.reshape(-1, 4), anchors.repeat(codes.shape[0], 1)).view(codes.shape)


def log_odds(logits: Tensor) -> Tensor:
    """Of a softmax over K + 1 classes, the background first, the logits of the sigmoids that give the same K probabilities.

    z_k - log sum_{j != k} exp(z_j), without cancellation: the largest class's own sum is made without it, and every other class has at
    most half of the whole sum.
    """
    z = accumulate(logits)
    largest = z.argmax(-1, keepdim=True)
    top = z.gather(-1, largest)
    exponentials = (z - top).exp()
    others = exponentials.sum(-1, keepdim=True) - exponentials.scatter(-1, largest, 0.0)
    rest = z.scatter(-1, largest, -torch.inf).logsumexp(-1, keepdim=True)
    return (z - (top + others.log()).scatter(-1, largest, rest))[..., 1:]


class DenseHead:
    """What the families' adapters know of their heads. `coder`, `anchor_generator` and `regression_module` are a family's own."""

    head_module = "head"

    def anchor_generator(self, model: Module) -> Module:
        return model.anchor_generator

    def coder(self, model: Module) -> Any:
        return model.box_coder

    def regression_module(self, model: Module) -> nn.Module:
        """The last convolution of the box regression, or the DistributionRegression in its place."""
        return model.head.regression_head.bbox_reg

    def towers(self, model: Module) -> dict[str, Tower]:
        """The branches of the head by name. Raises ValueError for a head without convolutions to share."""
        return {
            "classification": cut(model.head.classification_head.conv),
            "regression": cut(model.head.regression_head.conv),
        }

    def watched(self, model: Module, crosses: bool) -> dict[str, nn.Module]:
        """The submodules whose outputs, a tensor a level, `head_outputs` needs, and with `crosses` those that `cross` needs."""
        module = self.regression_module(model)
        found: dict[str, nn.Module] = {"distribution": module.logits} if isinstance(module, DistributionRegression) else {}
        if crosses:
            found |= {name: tower.held for name, tower in self.towers(model).items() if tower.held is not None}
        return found

    def anchors(self, model: Module, images: Any, features: list[Tensor]) -> list[Tensor]:
        """(A_l, 4) of each level that the head takes."""
        generator = self.anchor_generator(model)
        counts = generator.num_anchors_per_location()
        if len(counts) != len(features):
            raise ValueError(f"the head takes {len(counts)} levels, the tapped module gives {len(features)}: tap the head's input")
        cells = [x.shape[-2] * x.shape[-1] * count for x, count in zip(features, counts, strict=True)]
        # Its anchors have the features' type, in which 16 bits are some pixels off.
        like = [accumulate(x[:0]).new_empty(1).expand(x.shape) for x in features]
        return list(generator(images, like)[0].split(cells))

    def head_outputs(self, model: Module, images: Any, seen: HeadRecord) -> HeadOutputs:
        """What the head said in the pass that was `seen`, of every level that it takes."""
        anchors = self.anchors(model, images, seen.features)
        counts = [len(level) for level in anchors]
        classification = list(seen.output["cls_logits"].split(counts, 1))
        return self._outputs(model, classification, list(seen.output["bbox_regression"].split(counts, 1)), anchors, seen.parts)

    def _outputs(
        self,
        model: Module,
        classification: list[Tensor],
        regression: list[Tensor],
        anchors: list[Tensor],
        parts: Mapping[str, list[Tensor]],
    ) -> HeadOutputs:
        coder, distribution = self.coder(model), None
        if "distribution" in parts:
            bins = cast(DistributionRegression, self.regression_module(model)).bins
            distribution = [rows(logits, 4 * bins).unflatten(2, (4, bins)) for logits in parts["distribution"]]
        boxes = [decode(coder, codes, level) for codes, level in zip(regression, anchors, strict=True)]
        return HeadOutputs(classification, regression, anchors, boxes, distribution)

    def predictors(self, model: Module) -> dict[str, tuple[nn.Module, bool]]:
        """The last module of classification and of regression, and whether a ReLU follows."""
        classes = model.head.classification_head.cls_logits
        return {"classification": (classes, False), "regression": (self.regression_module(model), isinstance(model, FCOS))}

    def cross(self, model: Module, student: HeadRecord, teacher: HeadRecord, anchors: list[Tensor]) -> HeadOutputs:
        """The head of the teacher `model` from its last convolutions on, on what the student's has there (CrossKD, arXiv 2306.11369).

        student, teacher: their records of the same levels;   anchors: the teacher's.
        The student's features get the teacher's statistics (`align_statistics`), then the activation.
        Raises ValueError where channels or sizes differ, and where the student's head has no branch that the teacher's has.
        """
        towers = self.towers(model)
        missing = [name for name, tower in towers.items() if tower.held is not None and name not in student.parts]
        if missing:
            raise ValueError(f"the teacher's {teacher.head} goes on from {missing} of the student's head, and a {student.head} has none")
        found: dict[str, list[Tensor]] = {}
        parts: dict[str, list[Tensor]] = {}
        columns = {"classification": 0, "regression": 4}
        for name, (predictor, relu) in self.predictors(model).items():
            branch = name if name in towers else "shared"
            for s, t in zip(student.parts.get(branch, student.features), teacher.parts.get(branch, teacher.features), strict=True):
                x = self._tail(towers[branch], s, t)
                if isinstance(predictor, DistributionRegression):
                    logits = predictor.logits(x)
                    parts.setdefault("distribution", []).append(logits)
                    y = predictor.expectation(logits)
                else:
                    y = predictor(x)
                per_anchor = columns[name] or self.classes(model)
                found.setdefault(name, []).append(rows(F.relu(y) if relu else y, per_anchor))
        return self._outputs(model, found["classification"], found["regression"], anchors, parts)

    def classes(self, model: Module) -> int:
        return model.head.classification_head.num_classes

    @staticmethod
    def _tail(tower: Tower, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"the teacher's head cannot take the student's head features: {tuple(student.shape)} there, {tuple(teacher.shape)} here"
            )
        x = align_statistics(student, teacher)
        x = x if tower.held is None else F.relu(x)
        for module in tower.tail:
            x = module(as_parameters(x, module) if isinstance(module, nn.Conv2d) else x)
        return x


class SoftmaxHead(DenseHead):
    """SSD's: single convolutions, and a softmax over the classes and the background."""

    def watched(self, model: Module, crosses: bool) -> dict[str, nn.Module]:
        if crosses:
            raise ValueError(f"{type(model).__name__} has a single convolution a level, and nothing in front of it to share with a teacher")
        return {}

    def head_outputs(self, model: Module, images: Any, seen: HeadRecord) -> HeadOutputs:
        outputs = super().head_outputs(model, images, seen)
        return outputs._replace(classification=[log_odds(z) for z in outputs.classification])


class RegionProposalHead(DenseHead):
    """Faster R-CNN's region proposal network: one tower for both branches, one class."""

    head_module = "rpn.head"

    def anchor_generator(self, model: Module) -> Module:
        return model.rpn.anchor_generator

    def coder(self, model: Module) -> Any:
        return model.rpn.box_coder

    def regression_module(self, model: Module) -> nn.Module:
        return model.rpn.head.bbox_pred

    def towers(self, model: Module) -> dict[str, Tower]:
        return {"shared": cut(model.rpn.head.conv)}

    def predictors(self, model: Module) -> dict[str, tuple[nn.Module, bool]]:
        return {"classification": (model.rpn.head.cls_logits, False), "regression": (self.regression_module(model), False)}

    def classes(self, model: Module) -> int:
        return 1

    def head_outputs(self, model: Module, images: Any, seen: HeadRecord) -> HeadOutputs:
        objectness, deltas = seen.output
        anchors = self.anchors(model, images, seen.features)
        return self._outputs(model, [rows(x, 1) for x in objectness], [rows(x, 4) for x in deltas], anchors, seen.parts)
