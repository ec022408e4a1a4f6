"""`logit_bce` and `logit_kl` of one level, number by number, with their gradients."""

from __future__ import annotations

import math

import numpy as np

from .numeric import sign


def _sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _one(weight: np.ndarray | None, n: int, h: int, w: int) -> float:
    return 1.0 if weight is None else float(weight[n, h, w])


def logit_bce(s: np.ndarray, t: np.ndarray, weight: np.ndarray | None, beta: float) -> np.ndarray:
    """(N,): sum of weight * |sigma(s) - sigma(t)|^beta * (max(s, 0) - s * sigma(t) + log(1 + exp(-|s|)))."""
    terms: list[list[float]] = [[] for _ in range(s.shape[0])]
    for n, k, h, w in np.ndindex(*s.shape):
        x, y = float(s[n, k, h, w]), _sigma(float(t[n, k, h, w]))
        error = max(x, 0.0) - x * y + math.log1p(math.exp(-abs(x)))
        terms[n].append(_one(weight, n, h, w) * abs(_sigma(x) - y) ** beta * error)
    return np.array([math.fsum(image) for image in terms])


def logit_bce_gradient(s: np.ndarray, t: np.ndarray, weight: np.ndarray | None, beta: float, upstream: np.ndarray) -> np.ndarray:
    """d(sum upstream * logit_bce)/ds: of d = sigma(s) - sigma(t), |d|^beta * d + beta * |d|^(beta - 1) * sign(d) * sigma'(s) * BCE."""
    out = np.zeros(s.shape)
    for n, k, h, w in np.ndindex(*s.shape):
        x, y = float(s[n, k, h, w]), _sigma(float(t[n, k, h, w]))
        p = _sigma(x)
        slope = abs(p - y) ** beta * (p - y)
        if beta > 0 and p != y:
            error = max(x, 0.0) - x * y + math.log1p(math.exp(-abs(x)))
            slope += beta * abs(p - y) ** (beta - 1) * sign(p - y) * p * (1 - p) * error
        out[n, k, h, w] = upstream[n] * _one(weight, n, h, w) * slope
    return out


def _softmax(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [value / math.fsum(exponentials) for value in exponentials]


def logit_kl(s: np.ndarray, t: np.ndarray, weight: np.ndarray | None, temperature: float, groups: int) -> np.ndarray:
    """(N,): sum of weight * q * (log q - log p) over blocks of channels."""
    bins = s.shape[1] // groups
    terms: list[list[float]] = [[] for _ in range(s.shape[0])]
    for n, g, h, w in np.ndindex(s.shape[0], groups, *s.shape[2:]):
        block = slice(g * bins, (g + 1) * bins)
        p, q = (_softmax(x[n, block, h, w].tolist(), temperature) for x in (s, t))
        terms[n] += [_one(weight, n, h, w) * b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True)]
    return np.array([math.fsum(image) for image in terms])


def logit_kl_gradient(
    s: np.ndarray, t: np.ndarray, weight: np.ndarray | None, temperature: float, groups: int, upstream: np.ndarray
) -> np.ndarray:
    """d(sum upstream * logit_kl)/ds: weight * (p - q) / temperature."""
    bins, out = s.shape[1] // groups, np.zeros(s.shape)
    for n, g, h, w in np.ndindex(s.shape[0], groups, *s.shape[2:]):
        block = slice(g * bins, (g + 1) * bins)
        p, q = (np.array(_softmax(x[n, block, h, w].tolist(), temperature)) for x in (s, t))
        out[n, block, h, w] = upstream[n] * _one(weight, n, h, w) * (p - q) / temperature
    return out
