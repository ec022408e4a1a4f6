"""Weighted means over the pixels of one level, with gradients, and its randomly masked pixels, with integers of Python."""

from __future__ import annotations

import math

import numpy as np


def pool_weights(a: np.ndarray, normalize: str) -> np.ndarray:
    """(N, H, W): a over its sum of an image, 0 where that is 0 ("mean"), or the softmax of a ("softmax")."""
    out = np.zeros_like(a, dtype=np.float64)
    for n in range(a.shape[0]):
        values = a[n].ravel().tolist()
        if normalize == "softmax":
            values = [math.exp(v - max(values)) for v in values]
        total = math.fsum(values)
        out[n] = np.array([v / total if total else 0.0 for v in values]).reshape(a.shape[1:])
    return out


def spatial_pool(x: np.ndarray, a: np.ndarray, normalize: str) -> np.ndarray:
    """(N, C): sum_hw of the weights times x."""
    weights = pool_weights(a, normalize)
    out = np.zeros(x.shape[:2])
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[n, c] = math.fsum((weights[n] * x[n, c]).ravel().tolist())
    return out


def spatial_pool_gradient(x: np.ndarray, a: np.ndarray, normalize: str, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d(sum upstream * spatial_pool) / dx and / da."""
    weights, means = pool_weights(a, normalize), spatial_pool(x, a, normalize)
    dx, da = np.zeros(x.shape), np.zeros(a.shape)
    for n, h, w in np.ndindex(*a.shape):
        # What a pixel has over the mean is what more of it adds.
        over = math.fsum(upstream[n, c] * (x[n, c, h, w] - means[n, c]) for c in range(x.shape[1]))
        total = math.fsum(a[n].ravel().tolist())
        da[n, h, w] = over * weights[n, h, w] if normalize == "softmax" else over / total if total else 0.0
        for c in range(x.shape[1]):
            dx[n, c, h, w] = weights[n, h, w] * upstream[n, c]
    return dx, da


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 of Salmon et al. (SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def kept_pixels(seed: int, call: int, ratio: float, level: int, shape: tuple[int, ...]) -> np.ndarray:
    """(N, H, W), 1 where `random_mask` keeps the pixels of a level (N, C, H, W) and 0 where it does not."""
    n, _, h, w = shape
    key = (seed % 2**32, (seed >> 32) % 2**32)
    bar = math.floor(ratio * 2**32)
    kept = [philox((p, i, level, call % 2**32), key)[0] >= bar for i in range(n) for p in range(h * w)]
    return np.array(kept, dtype=np.float64).reshape(n, h, w)
