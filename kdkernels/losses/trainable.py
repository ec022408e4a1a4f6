"""Losses with parameters of their own: convolutions that bring the student to the teacher, blocks that both pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..library import once_differentiable
from ..pyramid import Pyramid, as_pyramid
from .base import DistillationLoss


class Trainable(DistillationLoss):
    """Base of the losses with parameters of their own.

    They are made by `build`, or by the first call, for the channels that they see, in fp32 on the features' device; their initial values
    depend on `seed` alone, and the caller's random stream is as it was. Call `build` before an optimiser looks for `parameters()` and
    before `load_state_dict`.

    A subclass defines `make`, and calls `self.trainable` once an evaluation: it may be inside DistributedDataParallel.
    """

    seed: int = 0

    def trains(self) -> bool:
        """Whether there is anything to train with the options chosen."""
        return True

    def make(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        """The parts for levels (N, C_S, H, W) and (N, C_T, H', W'); its random numbers are torch's."""
        raise TypeError(f"{type(self).__name__} does not define make")

    def build(self, student_features: Pyramid, teacher_features: Pyramid) -> Trainable:
        """Makes the parts unless they are there."""
        if self.trainable is None and self.trains():
            student, _ = as_pyramid("student_features", student_features)
            teacher, _ = as_pyramid("teacher_features", teacher_features)
            if not student:
                return self
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(self.seed)
                self.trainable = self.make(student, teacher).to(student[0].device)
        return self


class Align(nn.Module):
    """A convolution a level from the student's channels to the teacher's, and bilinear interpolation where sizes differ.

    kernel_size: of the convolutions;   always: also where the channels are the same;   relu: behind each convolution
    """

    def __init__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], kernel_size: int = 1, always: bool = False, relu: bool = False
    ) -> None:
        super().__init__()
        self.relu = relu
        self.convolutions = nn.ModuleList(
            nn.Conv2d(s.shape[1], t.shape[1], kernel_size, padding=kernel_size // 2)
            if always or s.shape[1] != t.shape[1]
            else nn.Identity()
            for s, t in zip(student, teacher, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Levels (N, C_S, H, W) as (N, C_T, H', W'), each like its teacher level. Raises ValueError for another number of levels."""
        if len(student) != len(self.convolutions):
            raise ValueError(f"student_features have {len(student)} levels, the loss was built for {len(self.convolutions)}")
        aligned = []
        for level, (convolution, s, t) in enumerate(zip(self.convolutions, student, teacher, strict=True)):
            if isinstance(convolution, nn.Conv2d):
                if convolution.in_channels != s.shape[1]:
                    raise ValueError(f"level {level}: the loss was built for {convolution.in_channels} channels, got {s.shape[1]}")
                if convolution.out_channels != t.shape[1]:
                    raise ValueError(f"level {level}: the loss was built for {convolution.out_channels} teacher channels, got {t.shape[1]}")
                s = convolution(as_parameters(s, convolution))
                s = F.relu(s) if self.relu else s
            elif s.shape[1] != t.shape[1]:
                raise ValueError(f"level {level}: the loss was built for {t.shape[1]} channels, got {s.shape[1]}")
            if s.shape[-2:] != t.shape[-2:]:
                s = F.interpolate(s, size=tuple(t.shape[-2:]), mode="bilinear", align_corners=False)
            aligned.append(s)
        return aligned


def as_parameters(x: Tensor, module: nn.Module) -> Tensor:
    """x in the type of the module's parameters; under autocast, which chooses for itself, as it is."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(next(module.parameters()).dtype)


def trained_part(loss: nn.Module) -> Trainable | None:
    """The loss itself, or the one inside its wrappers (AID, PAD), that has something to train."""
    return next((part for part in loss.modules() if isinstance(part, Trainable) and part.trains()), None)


class _Facing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.dtype = b.dtype
        return a.view_as(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, -grad.to(ctx.dtype)


def facing(a: Tensor, b: Tensor) -> Tensor:
    """a, for a comparison with b's values that depends on a - b alone and takes b for a constant: b gets the gradient all the same."""
    return _Facing.apply(a, b)
