"""AID self-distillation: the teacher is an earlier copy of the student, and images it fails on teach less."""

import argparse
import copy

import torch
from common import random_batches
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from kdkernels import AIDLoss, BMFILoss, Distiller

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--size", type=int, default=256, help="shorter side in pixels")
options = parser.parse_args()

torch.manual_seed(0)
student = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).train()
teacher = copy.deepcopy(student)  # yours is the best checkpoint so far of the same architecture
distiller = Distiller(student, teacher, {"aid": AIDLoss(BMFILoss(lambda_=0.01), alpha=0.1)})

optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
for step, (images, targets) in enumerate(random_batches(options.steps, options.size)):
    losses = distiller(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
    optimizer.step()
    print(f"step {step}: " + ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items()))
