"""PKD (methods.md 6.8): mean (z_S - z_T)^2 / 2 of features standardised per channel over the batch, with the unbiased deviation."""

from __future__ import annotations

from .layers import Level, resized, size
from .tape import Number, Rows, mean, root, split, square, total


def _standardised(values: list[Number], eps: float) -> list[Number]:
    middle = mean(values)
    spread = total([square(value - middle) for value in values])
    deviation = root(spread / (len(values) - 1)) if len(values) > 1 else 0.0
    return [(value - middle) / (deviation + eps) for value in values]


def terms(s: list[Level], t: list[Level], weight: float, eps: float = 1e-6) -> dict[str, Rows]:
    totals, numerators = [], []
    for a, b in zip(s, t, strict=True):
        count, channels, height, width = size(b)
        a = resized(a, height, width)
        own: list[list[Number]] = [[] for _ in range(count)]
        for c in range(channels):
            flat = [_standardised([v for n in range(count) for row in x[n][c] for v in row], eps) for x in (a, b)]
            for i, (x, y) in enumerate(zip(*flat, strict=True)):
                own[i // (height * width)].append(square(x - y))
        sums = [total(parts) for parts in own]
        totals.append(total(sums) * (weight / (2.0 * count * channels * height * width)))
        numerators.append(sums)
    return {"correlation": split(totals, numerators)}
