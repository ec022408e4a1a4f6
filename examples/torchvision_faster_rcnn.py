"""Distil a torchvision Faster R-CNN whose student has another width: the channel adapters train beside it."""

import argparse

import torch
from common import random_batches
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kdkernels import BMFILoss, Distiller, GKDLoss


def faster_rcnn(body: torch.nn.Module, widths: list[int], channels: int, size: int) -> FasterRCNN:
    layers = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    return FasterRCNN(BackboneWithFPN(body, layers, widths, channels, LastLevelMaxPool()), num_classes=4, min_size=size, max_size=2 * size)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--size", type=int, default=256, help="shorter side in pixels")
options = parser.parse_args()

torch.manual_seed(0)
teacher = faster_rcnn(resnet50(weights=None), [256, 512, 1024, 2048], 256, options.size)
student = faster_rcnn(resnet18(weights=None), [64, 128, 256, 512], 128, options.size).train()
# Coefficients of FGD for two-stage detectors, whose losses are smaller.
losses = {"gkd": GKDLoss(weight=0.05), "bmfi": BMFILoss(alpha=5e-5, gamma=5e-5)}
distiller = Distiller(student, teacher, losses)

batches = random_batches(options.steps, options.size)
distiller.build(*next(random_batches(1, options.size)))  # the adapters must exist before the optimiser looks for parameters
parameters = [*student.parameters(), *distiller.trainable.parameters()]
optimizer = torch.optim.SGD(parameters, lr=0.005, momentum=0.9)
for step, (images, targets) in enumerate(batches):
    found = distiller(images, targets)
    optimizer.zero_grad()
    sum(found.values()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 10.0)
    optimizer.step()
    print(f"step {step}: " + ", ".join(f"{name} {float(value):.4f}" for name, value in {**found, **distiller.last_values()}.items()))
