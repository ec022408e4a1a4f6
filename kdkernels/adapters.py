"""Bring the student's pyramid to the teacher's channels and sizes, and pair the levels of two pyramids by stride."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def level_strides(features: Mapping[str, Tensor], frame: tuple[int, int]) -> dict[str, float]:
    """Stride of each level in log2 of pixels, from the (H, W) of the padded batch; a level's own ceil is rounded away."""
    return {
        name: (math.log2(frame[0] / max(x.shape[-2], 1)) + math.log2(frame[1] / max(x.shape[-1], 1))) / 2 for name, x in features.items()
    }


def pair_levels(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], frame: tuple[int, int]) -> list[tuple[str, str]]:
    """Pair each student level with the teacher level of the nearest stride.

    Args:
        student, teacher: level name to (N, C, H, W); both cover the same padded batch.
        frame: (H, W) of that batch in pixels.

    Returns:
        (student level, teacher level) in the student's order. Levels of equal stride are paired by order. A level without a
        partner within half an octave is left out.

    Raises:
        ValueError: when no level has a partner; names both sides' level shapes.
    """
    free = level_strides(teacher, frame)
    pairs = []
    for name, stride in level_strides(student, frame).items():
        best = min(free, key=lambda other: abs(free[other] - stride), default=None)
        if best is not None and abs(free[best] - stride) <= 0.5:
            del free[best]
            pairs.append((name, best))
    if not pairs:
        raise ValueError(
            f"no student level has the stride of a teacher level: student {_shapes(student)}, teacher {_shapes(teacher)}, "
            f"image {frame[0]} x {frame[1]}"
        )
    return pairs


class PyramidAdapter(nn.Module):
    """1x1 convolutions where channels differ and bilinear interpolation where sizes differ, student to teacher.

    The convolutions are made by `build`, or by the first call: call `build` before an optimiser or DistributedDataParallel
    looks for parameters. Their initial values do not depend on, nor disturb, the caller's random stream.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.convolutions = nn.ModuleDict()

    def build(self, student: Mapping[str, Tensor], teacher: Sequence[Tensor]) -> PyramidAdapter:
        """Make the missing convolutions for these levels, on their device, in fp32. Student and teacher in paired order."""
        with torch.random.fork_rng(devices=[]):
            for (name, s), t in zip(student.items(), teacher, strict=True):
                key = _key(name)
                if s.shape[1] != t.shape[1] and key not in self.convolutions:
                    # A seed of its own per level, so that adding a level leaves the others as they were.
                    torch.default_generator.manual_seed(self.seed + sum(name.encode()))
                    self.convolutions[key] = nn.Conv2d(s.shape[1], t.shape[1], 1).to(s.device)
        return self

    def forward(self, student: Mapping[str, Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Student levels (N, C_s, H_s, W_s) as a list of (N, C_t, H_t, W_t), each like its teacher level."""
        self.build(student, teacher)
        adapted = []
        for (name, s), t in zip(student.items(), teacher, strict=True):
            if s.shape[1] != t.shape[1]:
                convolution = cast(nn.Conv2d, self.convolutions[_key(name)])
                if convolution.in_channels != s.shape[1] or convolution.out_channels != t.shape[1]:
                    raise ValueError(
                        f"level {name!r}: the adapter was built for {convolution.in_channels} -> {convolution.out_channels} channels, "
                        f"got {s.shape[1]} -> {t.shape[1]}"
                    )
                s = convolution(s if torch.is_autocast_enabled(s.device.type) else s.to(convolution.weight.dtype))
            if s.shape[-2:] != t.shape[-2:]:
                s = F.interpolate(s, size=tuple(t.shape[-2:]), mode="bilinear", align_corners=False)
            adapted.append(s)
        return adapted


def _key(level: str) -> str:
    return "level_" + level.replace(".", "_")


def _shapes(features: Mapping[str, Tensor]) -> str:
    return "{" + ", ".join(f"{name}: {tuple(x.shape)}" for name, x in features.items()) + "}"
