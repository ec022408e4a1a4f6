"""`random_mask`: features with random pixels set to 0, the same ones whatever device computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

    counter: four tensors of words, int64 in [0, 2^32); key: two; all of shapes that broadcast. Returns the four words.
    """
    c, k = list(counter), list(key)
    for turn in range(_ROUNDS):
        if turn:
            k = [(word + weyl) & _WORD for word, weyl in zip(k, _WEYL, strict=True)]
        (high_0, low_0), (high_1, low_1) = (_product(m, word) for m, word in zip(_MULTIPLIERS, c[::2], strict=True))
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
    return c


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Both words of a product of 64 bits, by halves of the multiplier: the whole of it does not fit an int64."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def kept_pixels(state: Tensor, threshold: int, level: int, images: int, pixels: int) -> Tensor:
    """Which pixels of a level `random_mask` keeps, (images, pixels) bool: those whose random word is at least the threshold."""
    word = torch.arange(max(images, pixels), device=state.device)
    seed, call = state.unbind()
    nothing = torch.zeros_like(seed)
    counter = (word[None, :pixels], word[:images, None], nothing + level, call & _WORD)
    return philox(counter, (seed & _WORD, (seed >> 32) & _WORD))[0] >= threshold


def random_mask(x: Sequence[Tensor], state: Tensor, threshold: int) -> list[Tensor]:
    """x with pixels set to 0, in all channels, with probability threshold / 2^32.

    Pixel p of image n and level l is kept if the first word of Philox4x32-10 is at least the threshold, where its key is the low and the
    high word of state[0] and its counter (p, n, l, low word of state[1]).

    x: L tensors (N, C, H, W), of any type; state: int64 (2,). Returns levels like x.
    """
    masked = []
    for index, level in enumerate(x):
        n, _, h, w = level.shape
        keeps = kept_pixels(state, threshold, index, n, h * w).view(n, 1, h, w)
        # A clone has the strides of its source, what masked_fill makes not always.
        masked.append(level.clone().masked_fill_(~keeps, 0))
    return masked
