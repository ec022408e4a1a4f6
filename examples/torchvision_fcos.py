"""Distil a torchvision FCOS: GKD's map and BMFI beside the detector's own losses, in one backward pass."""

import argparse

import torch
from common import random_batches
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kdkernels import BMFILoss, Distiller, GKDLoss


def fcos(body: torch.nn.Module, widths: list[int], size: int) -> FCOS:
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, layers, widths, 256, LastLevelP6P7(256, 256))
    return FCOS(backbone, num_classes=4, min_size=size, max_size=2 * size)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--size", type=int, default=256, help="shorter side in pixels")
options = parser.parse_args()

torch.manual_seed(0)
teacher = fcos(resnet50(weights=None), [512, 1024, 2048], options.size)  # yours is a trained one: teacher.load_state_dict(...)
student = fcos(resnet18(weights=None), [128, 256, 512], options.size).train()
distiller = Distiller(student, teacher, {"gkd": GKDLoss(weight=0.1), "bmfi": BMFILoss()})

optimizer = torch.optim.SGD(student.parameters(), lr=0.005, momentum=0.9)
for step, (images, targets) in enumerate(random_batches(options.steps, options.size)):
    losses = distiller(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
    optimizer.step()
    values = {**{name: float(loss) for name, loss in losses.items()}, **{name: float(v) for name, v in distiller.last_values().items()}}
    print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
