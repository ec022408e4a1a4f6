"""Start values: inheriting from the teacher, frozen BatchNorm, and a hash that proves what a run started from."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import nn


class Inherited(NamedTuple):
    """How many of the tensors of neck and head were copied."""

    copied: int
    candidates: int

    def __str__(self) -> str:
        return f"{self.copied} of {self.candidates} tensors of neck and head copied from the teacher"


def body(model: nn.Module) -> nn.Module:
    """The feature extractor without the neck: `backbone.body` or `backbone.features` in torchvision, else `backbone`, else the model."""
    backbone = getattr(model, "backbone", model)
    for name in ("body", "features"):
        part = getattr(backbone, name, None)
        if isinstance(part, nn.Module):
            return part
    return backbone


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module) -> Inherited:
    """Copy the teacher's neck and head (everything but the body) into the student, tensor by tensor of equal name and shape.

    Raises ValueError when nothing fits, because the run would then not be what was asked for.
    """
    own_body = {id(t) for t in body(student).state_dict(keep_vars=True).values()}
    source = teacher.state_dict()
    candidates = [(name, tensor) for name, tensor in student.state_dict(keep_vars=True).items() if id(tensor) not in own_body]
    copied = 0
    for name, tensor in candidates:
        if name in source and source[name].shape == tensor.shape:
            tensor.copy_(source[name])
            copied += 1
    if not copied:
        raise ValueError("init_student: no tensor of the teacher's neck and head has the name and shape of one of the student's")
    return Inherited(copied, len(candidates))


def freeze_batchnorm(model: nn.Module) -> int:
    """Put the body's BatchNorm layers into eval mode and freeze their parameters; returns their number. `model.train()` undoes the mode."""
    layers = [m for m in body(model).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.eval().requires_grad_(False)
    return len(layers)


def state_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state_dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
