"""Non-local block with dot-product affinity (methods.md 6.1): x + BN(W y), y_i = (1/P) sum_j (theta_i . phi_j) g_j, in quadratic form."""

from __future__ import annotations

from dataclasses import dataclass

from .layers import Level, batch_norm, conv2d, max_pool, size
from .tape import Number, dot


@dataclass(frozen=True)
class Parameters:
    """Each a 1x1 convolution's (weight (O, C, 1, 1), bias or None); norm: the BatchNorm's weight and bias."""

    theta: tuple[list, list | None]
    phi: tuple[list, list | None]
    g: tuple[list, list | None]
    out: tuple[list, list | None]
    norm: tuple[list[Number], list[Number]]


def block(x: Level, p: Parameters, pool: int) -> Level:
    """`pool`: side of the windows of phi and g, not larger than the level."""
    count, _, height, width = size(x)
    theta, phi, g = conv2d(x, *p.theta), conv2d(x, *p.phi), conv2d(x, *p.g)
    window = (min(pool, height), min(pool, width))
    phi, g = max_pool(phi, window), max_pool(g, window)
    inner, rows, columns = len(phi[0]), len(phi[0][0]), len(phi[0][0][0])
    seen = [(a, b) for a in range(rows) for b in range(columns)]
    y: Level = [[[[0.0] * width for _ in range(height)] for _ in range(inner)] for _ in range(count)]
    for n in range(count):
        keys = [[phi[n][k][a][b] for k in range(inner)] for a, b in seen]
        for h in range(height):
            for w in range(width):
                query = [theta[n][k][h][w] for k in range(inner)]
                affinity = [dot(query, key) / len(seen) for key in keys]
                for k in range(inner):
                    y[n][k][h][w] = dot(affinity, [g[n][k][a][b] for a, b in seen])
    added = batch_norm(conv2d(y, *p.out), *p.norm)
    return [
        [[[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*planes, strict=True)] for planes in zip(*images, strict=True)]
        for images in zip(x, added, strict=True)
    ]
