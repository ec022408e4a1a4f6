"""MGD (methods.md 6.6) with its own Philox4x32-10 (Salmon et al., SC 2011): alpha / N || G(mask * align(s)) - t ||^2."""

from __future__ import annotations

import math

from .layers import Level, aligned, conv_of, each, pairs, size
from .tape import Rows, relu, square, total

_LOW = 2**32 - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words of 32 bits after ten rounds."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & _LOW, (first >> 32) ^ d ^ high, first & _LOW
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return a, b, c, d


def kept(seed: int, calls: int, level: int, image: int, pixel: int, ratio: float) -> bool:
    """Whether random_mask keeps this cell."""
    seed &= 2**64 - 1
    word = philox((pixel, image, level, calls & _LOW), (seed & _LOW, seed >> 32))[0]
    return word >= math.floor(ratio * 2**32)


def masked(x: Level, seed: int, calls: int, level: int, ratio: float) -> Level:
    count, channels, height, width = size(x)
    return [
        [
            [[x[n][c][h][w] if kept(seed, calls, level, n, h * width + w, ratio) else 0.0 for w in range(width)] for h in range(height)]
            for c in range(channels)
        ]
        for n in range(count)
    ]


def terms(
    s: list[Level],
    t: list[Level],
    parameters: dict,
    state: tuple[int, int],
    alpha: float,
    ratio: float,
    align: str,
    generators: list[tuple[str, str]],
) -> dict[str, Rows]:
    """state: seed and number of earlier calls; align: prefix of the aligning convolutions; generators: names of G's two, a level."""
    rows = []
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        x = masked(aligned(a, b, parameters, level, align), *state, level, ratio)
        first, second = generators[level]
        x = conv_of(each(relu, conv_of(x, parameters, first)), parameters, second)
        rows.append([total([square(d) for _, _, _, d in pairs(x, b, n)]) * (alpha / len(b)) for n in range(len(b))])
    return {"generation": rows}
