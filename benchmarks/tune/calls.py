"""What the large kernels are timed on: inputs of one size, and a few calls that are like those of the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.triton.channel_sums import channel_sums
from kdkernels.triton.gradient import gradient
from kdkernels.triton.levels import sizes_of
from kdkernels.triton.reduce import reduce

from ..measure.memory import cache_bytes
from ..measure.samples import MOST_SAMPLES
from ..registry import LAYOUTS


class Inputs(NamedTuple):
    """x, target, arriving: levels (N, C, H, W);   channel: packed fp32 (N, C) of every level;   pixel: packed fp32 maps of every level"""

    x: list[Tensor]
    target: list[Tensor]
    arriving: list[Tensor]
    channel: Tensor
    pixel: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.x, *self.target, *self.arriving, self.channel, self.pixel))


#: The results, all of them tensors that do not depend on block sizes but for the rounding.
Call = Callable[[Inputs], Sequence[Tensor]]


def _reduced(i: Inputs, **asked: Any) -> list[Tensor]:
    """The maps and the channel sums, with the small kernel that finishes them: how much it has to do depends on the large one's blocks."""
    *maps, parts = reduce(i.x, **asked)
    found = [x for x in maps if x is not None]
    if parts is not None:
        _, channels, pixels = sizes_of(i.x)
        found.append(channel_sums(parts, channels, pixels))
    return found


#: Kernel -> what is asked of it -> the call.
CALLS: Mapping[str, Mapping[str, Call]] = {
    "reduce": {
        "channel means": lambda i: _reduced(i, channel="abs"),
        "squared error": lambda i: _reduced(i, target=i.target, error_channel=i.channel),
        "attention and weighted sum": lambda i: _reduced(i, weights=i.channel, channel="abs", spatial_abs=True),
    },
    "gradient": {
        "weighted sum": lambda i: gradient(i.x, product=(i.channel, i.pixel)),
        "squared error": lambda i: gradient(i.x, target=i.target, error=(i.channel, i.pixel)),
        "everything": lambda i: gradient(
            i.x,
            target=i.target,
            arriving=i.arriving,
            product=(i.channel, i.pixel),
            sign=(i.channel, i.pixel),
            error=(i.channel, i.pixel),
        ),
    },
}


def samples(shapes: Sequence[Sequence[int]], dtype: torch.dtype, layout: str, device: torch.device, seed: int) -> list[Inputs]:
    """Inputs of different contents, two at the least, together more than three times the last-level cache.

    shapes: (N, C, H, W) of every level
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def levels() -> list[Tensor]:
        return [normal(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for shape in shapes]

    def one() -> Inputs:
        channels, pixels = sum(n * c for n, c, _, _ in shapes), sum(n * h * w for n, _, h, w in shapes)
        return Inputs(levels(), levels(), levels(), normal(channels), normal(pixels))

    made = [one()]
    count = min(MOST_SAMPLES, -(-3 * cache_bytes(device) // made[0].nbytes) + 1)
    return made + [one() for _ in range(max(2, count) - 1)]
