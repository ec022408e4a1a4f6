"""GKD in a loop of your own, without the Distiller: the loss needs features and gradients of both networks, nothing else."""

import torch
from torch import nn

from kdkernels import GKDLoss

torch.manual_seed(0)
images, labels = torch.rand(4, 3, 64, 96), torch.randint(0, 5, (4,))
teacher, student = (nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 32, 3, 2, 1)) for width in (64, 16))
heads = [nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)) for _ in range(2)]

gkd = GKDLoss(weight=1.0)
optimizer = torch.optim.SGD([*student.parameters(), *heads[1].parameters()], lr=0.1)
for step in range(3):
    features_t, features_s = [teacher(images).detach().requires_grad_()], [student(images)]
    task_t = nn.functional.cross_entropy(heads[0](features_t[0]), labels)
    task_s = nn.functional.cross_entropy(heads[1](features_s[0]), labels)
    gradients_t = torch.autograd.grad(task_t, features_t)
    gradients_s = torch.autograd.grad(task_s, features_s, retain_graph=True)
    kd = gkd(features_s, features_t, gradients_s, gradients_t)
    optimizer.zero_grad()
    (task_s + kd).backward()
    optimizer.step()
    print(f"step {step}: task {task_s:.4f}, GKD {kd:.4f}")
