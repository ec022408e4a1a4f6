"""FRS (methods.md 6.9): features and classes where the teacher sees something."""

from __future__ import annotations

from .layers import Level, aligned, pairs, size
from .logits import best_probability, focal
from .tape import Rows, split, square, total


def terms(
    s: list[Level],
    t: list[Level],
    logits_s: list,
    logits_t: list,
    parameters: dict,
    alpha: float,
    beta: float,
    prefix: str = "",
) -> dict[str, Rows]:
    """logits (N, H W k, K) a level, the k anchors of a cell consecutive; the mask is that of the cell, for all of its anchors."""
    totals: dict[str, list] = {"feature": [], "classification": []}
    numerators: dict[str, list] = {"feature": [], "classification": []}
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        count, _, height, width = size(b)
        each_cell = len(logits_t[level][0]) // (height * width)
        mask = [
            [max(best_probability(image[i * each_cell + j]) for j in range(each_cell)) for i in range(height * width)]
            for image in logits_t[level]
        ]
        whole = sum(value for image in mask for value in image)
        x = aligned(a, b, parameters, level, prefix)
        features = [total([square(d) * mask[n][h * width + w] for _, h, w, d in pairs(x, b, n)]) for n in range(count)]
        classes = []
        for n in range(count):
            parts = []
            for i, (u, v) in enumerate(zip(logits_s[level][n], logits_t[level][n], strict=True)):
                parts += [focal(p, float(q), 0.0) * mask[n][i // each_cell] for p, q in zip(u, v, strict=True)]
            classes.append(total(parts))
        for term, own, coefficient in (("feature", features, alpha), ("classification", classes, beta)):
            totals[term].append(total(own) * (coefficient / whole))
            numerators[term].append(own)
    return {term: split(totals[term], numerators[term]) for term in totals}
