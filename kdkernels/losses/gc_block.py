"""Global context blocks (arXiv 1904.11492), as FGD's relation uses them: what a block adds to the features, not their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from .. import ops
from .trainable import Align, as_parameters


class GcBlock(nn.Module):
    """One level's block for C channels: x + transform(sum_hw softmax_hw(logits(x)) * x), which is the same at all positions.

    logits: 1x1 convolution to one channel;   transform: 1x1 convolution to C/2, LayerNorm, ReLU, 1x1 convolution to C that starts at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.logits = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), last := nn.Conv2d(inner, channels, 1)
        )
        nn.init.kaiming_normal_(self.logits.weight, nonlinearity="relu")
        for parameter in (cast(Tensor, self.logits.bias), *last.parameters()):
            nn.init.zeros_(parameter)


class Relation(nn.Module):
    """A block a level for the student and one for the teacher, both trained.

    align: whether a trained 1x1 convolution brings levels of other channels to the teacher's.
    """

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], align: bool = False) -> None:
        super().__init__()
        self.align = Align(student, teacher) if align else None
        self.student = nn.ModuleList(GcBlock(x.shape[1]) for x in teacher)
        self.teacher = nn.ModuleList(GcBlock(x.shape[1]) for x in teacher)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The student's levels as they are compared, and (N, C) a level: what its block adds to them less what the teacher's adds."""
        compared = list(student) if self.align is None else self.align(student, teacher)
        added = zip(_added(self.student, compared), _added(self.teacher, teacher), strict=True)
        return compared, [a - b for a, b in added]


def _added(blocks: nn.ModuleList, levels: Sequence[Tensor]) -> list[Tensor]:
    """(N, C) a level. Raises ValueError for other levels than the blocks were built for."""
    if len(levels) != len(blocks):
        raise ValueError(f"the features have {len(levels)} levels, the loss was built for {len(blocks)}")
    every = [cast(GcBlock, block) for block in blocks]
    for level, (block, x) in enumerate(zip(every, levels, strict=True)):
        if block.logits.in_channels != x.shape[1]:
            raise ValueError(f"level {level}: the loss was built for {block.logits.in_channels} channels, got {x.shape[1]}")
    logits = [block.logits(as_parameters(x, block))[:, 0] for block, x in zip(every, levels, strict=True)]
    pooled = ops.spatial_pool(levels, logits, "softmax")
    return [block.transform(as_parameters(x[:, :, None, None], block))[:, :, 0, 0] for block, x in zip(every, pooled, strict=True)]
