"""ACAM-KD as reconstructed (methods.md 6.12): masks learnt from features fused by cross-attention."""

from __future__ import annotations

import math

from .layers import Level, aligned, channel_means, conv2d, pairs, size
from .tape import Number, Rows, dot, sigmoid, softmax, square, total


def fused(s: Level, t: Level, query: tuple, key: tuple, value: tuple) -> Level:
    """A V with A = softmax(Q^T K / sqrt(Cq)) over the student's cells; Q of the teacher, K and V of the student."""
    q, k, v = conv2d(t, *query), conv2d(s, *key), conv2d(s, *value)
    count, inner, height, width = size(q)
    cells = [(h, w) for h in range(size(k)[2]) for w in range(size(k)[3])]
    out: Level = [[[[0.0] * width for _ in range(height)] for _ in v[0]] for _ in range(count)]
    for n in range(count):
        keys = [[k[n][i][a][b] for i in range(inner)] for a, b in cells]
        for h in range(height):
            for w in range(width):
                own = [q[n][i][h][w] for i in range(inner)]
                shares = softmax([dot(own, other) / math.sqrt(inner) for other in keys])
                for c in range(len(v[n])):
                    out[n][c][h][w] = dot(shares, [v[n][c][a][b] for a, b in cells])
    return out


def overlap(masks: list[list[Number]]) -> Number:
    """sum over ordered pairs i != j of 2 M_i.M_j / (sum M_i^2 + sum M_j^2)."""
    parts = []
    for i, a in enumerate(masks):
        for j, b in enumerate(masks):
            if i != j:
                parts.append(2.0 * dot(a, b) / (dot(a, a) + dot(b, b)))
    return total(parts)


def named(parameters: dict, levels: int) -> tuple[list[tuple[tuple, tuple, tuple]], list[tuple[list, list]]]:
    """`attention` and `selectors` of `terms`, from parameters by their names in the library."""

    def layer(level: int, name: str) -> tuple[list, list]:
        return parameters[f"levels.{level}.{name}.weight"], parameters[f"levels.{level}.{name}.bias"]

    attention = [(layer(level, "query"), layer(level, "key"), layer(level, "value")) for level in range(levels)]
    selectors = [
        ([row[0] for row in parameters[f"levels.{level}.channel_units.weight"]], parameters[f"levels.{level}.spatial_units.weight"])
        for level in range(levels)
    ]
    return attention, selectors


def terms(
    s: list[Level],
    t: list[Level],
    attention: list[tuple[tuple, tuple, tuple]],
    selectors: list[tuple[list, list]],
    parameters: dict,
    align: str,
    alpha: float = 1.0,
    lambda_: float = 1.0,
) -> dict[str, Rows]:
    """attention: (weight, bias) of Wq, Wk, Wv a level; selectors: m_c (M,) and m_s (M, C) a level."""
    found: dict[str, Rows] = {"channel": [], "spatial": [], "diversity": []}
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        count, channels, height, width = size(b)
        joint = fused(a, b, *attention[level])
        means = channel_means(joint)
        x = aligned(a, b, parameters, level, align)
        of_channels, of_cells = selectors[level]
        rows: dict[str, list] = {term: [] for term in found}
        for n in range(count):
            channel = [[sigmoid(m * v) for v in means[n]] for m in of_channels]
            cells = [(h, w) for h in range(height) for w in range(width)]
            spatial = [[sigmoid(dot(m, [joint[n][c][h][w] for c in range(channels)])) for h, w in cells] for m in of_cells]
            apart = [(c, h * width + w, square(d)) for c, h, w, d in pairs(x, b, n)]
            by_channel = [
                dot([mask[c] for c, _, _ in apart], [d for _, _, d in apart]) / (total(mask) * (height * width)) for mask in channel
            ]
            by_cell = [dot([mask[i] for _, i, _ in apart], [d for _, _, d in apart]) / (total(mask) * channels) for mask in spatial]
            rows["channel"].append(total(by_channel) * (alpha / (count * len(channel))))
            rows["spatial"].append(total(by_cell) * (alpha / (count * len(spatial))))
            rows["diversity"].append((overlap(channel) + overlap(spatial)) * (lambda_ / count))
        for term in found:
            found[term].append(rows[term])
    return found
