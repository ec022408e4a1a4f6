"""PAD (methods.md 3.4): term / (eps + exp(s_l)) + coefficient s_l, s_l = log Var of the student's level (biased, one number a level)."""

from __future__ import annotations

from collections.abc import Mapping

from .layers import Level, biased_variance
from .tape import Rows, exp, log


def terms(s: list[Level], base: Mapping[str, Rows], coefficients: Mapping[str, float], eps: float) -> dict[str, Rows]:
    """`base`: the terms of the loss inside, with their coefficients; s_l goes to the images in equal parts."""
    logs = [log(biased_variance(level)) for level in s]
    return {
        term: [
            [x / (exp(logs[level]) + eps) + logs[level] * (coefficients[term] / len(row)) for x in row] for level, row in enumerate(rows)
        ]
        for term, rows in base.items()
    }
