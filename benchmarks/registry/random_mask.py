"""`random_mask`: read x, write it with pixels at 0.

The baselines make the same words of Philox as everybody, in int64, as tensors of bits are not to be had of torch: they could not be
compared otherwise. A mask of torch.rand, another one on every device, would take them less time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels import functional

from .case import Case
from .entry import Entry, Inputs, pyramid

WORD = (1 << 32) - 1
RATIO = 0.65


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"x": pyramid(case, generator, device), "state": torch.tensor([20220507, 3], device=device), "ratio": RATIO}


def product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word. In three parts, none of which has more than 63 bits."""
    carried = word * (factor & 0xFFFF)
    upper = word * (factor >> 16) + (carried >> 16)
    return upper >> 16, (upper << 16 | carried & 0xFFFF) & WORD


def words(pixel: Tensor, image: Tensor, level: int, state: Tensor) -> Tensor:
    """The first words of Philox4x32-10 for these pixels."""
    a, b, c, d = pixel + 0 * image, image + 0 * pixel, torch.full_like(pixel, level), state[1] & WORD
    first, second = state[0] & WORD, state[0] >> 32 & WORD
    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = product(a, 0xD2511F53), product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = first + 0x9E3779B9 & WORD, second + 0xBB67AE85 & WORD
    return a


def eager(x: list[Tensor], state: Tensor, ratio: float) -> list[Tensor]:
    results = []
    for index, level in enumerate(x):
        n, _, h, w = level.shape
        pixel, image = torch.arange(h * w, device=level.device), torch.arange(n, device=level.device)[:, None]
        kept = words(pixel, image, index, state) >= math.floor(ratio * 2**32)
        results.append(level * kept.view(n, 1, h, w))
    return results


def paper(x: list[Tensor], state: Tensor, ratio: float) -> list[Tensor]:
    """MGD's code: a tensor of random numbers, made 0 and 1 by torch.where, times the features; image by image."""
    results = []
    for index, level in enumerate(x):
        masks = []
        for image in range(level.shape[0]):
            pixel = torch.arange(level.shape[2] * level.shape[3], device=level.device)
            random = words(pixel, torch.full_like(pixel, image), index, state).view(1, 1, *level.shape[2:])
            masks.append(torch.where(random < math.floor(ratio * 2**32), 0, 1))
        results.append(torch.mul(level, torch.cat(masks).to(level.dtype)))
    return results


ENTRIES = (
    Entry(
        name="random_mask",
        kind="primitive",
        inputs=inputs,
        call=functional.random_mask,
        eager=eager,
        paper=paper,
        # One is written. What is masked need not be read, as it is 0 whatever x holds there: of a channels_last x the kernels skip it. No
        # backward: it is the same call, of the gradient that comes.
        units={"forward": 2 - RATIO},
        values_like="x",
    ),
)
