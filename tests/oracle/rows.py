"""`channel_kl` and `correlation` of one level, number by number, with their gradients."""

from __future__ import annotations

import math

import numpy as np

from .numeric import zeros


def _distribution(x: np.ndarray, n: int, c: int, temperature: float) -> list[float]:
    """softmax of a channel's pixels, row after row."""
    logits = [value / temperature for row in x[n, c].tolist() for value in row]
    highest = max(logits)
    exponentials = [math.exp(logit - highest) for logit in logits]
    return [value / math.fsum(exponentials) for value in exponentials]


def channel_kl(s: np.ndarray, t: np.ndarray, temperature: float, entropy: bool) -> np.ndarray:
    """(N,): sum over the channels of sum_i p_i (log p_i - log q_i), or of -sum_i p_i log q_i."""
    rows = []
    for n in range(s.shape[0]):
        terms = []
        for c in range(s.shape[1]):
            for q, p in zip(_distribution(s, n, c, temperature), _distribution(t, n, c, temperature), strict=True):
                terms.append(p * ((math.log(p) if entropy else 0.0) - math.log(q)))
        rows.append(math.fsum(terms))
    return np.array(rows)


def channel_kl_gradient(s: np.ndarray, t: np.ndarray, temperature: float, upstream: np.ndarray) -> np.ndarray:
    """d(sum upstream * channel_kl)/ds: (q_i - p_i) / temperature."""
    out = np.zeros(s.shape)
    for n in range(s.shape[0]):
        for c in range(s.shape[1]):
            pairs = zip(_distribution(s, n, c, temperature), _distribution(t, n, c, temperature), strict=True)
            out[n, c] = np.array([upstream[n] * (q - p) / temperature for q, p in pairs]).reshape(s.shape[2:])
    return out


def _moments(values: list[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation; the deviation of one value is 0."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def _standardised(x: np.ndarray, eps: float) -> np.ndarray:
    out = np.zeros(x.shape)
    for c in range(x.shape[1]):
        mean, deviation = _moments([float(value) for value in x[:, c].reshape(-1)])
        out[:, c] = (x[:, c] - mean) / (deviation + eps)
    return out


def correlation_errors(s: np.ndarray, t: np.ndarray, eps: float) -> np.ndarray:
    """(N,): sum over channels and pixels of (z_s - z_t)^2."""
    errors = (_standardised(s, eps) - _standardised(t, eps)) ** 2
    return np.array([math.fsum(image.reshape(-1).tolist()) for image in errors])


def correlation(s: np.ndarray, t: np.ndarray, eps: float) -> np.ndarray:
    """(N,), whose sum is the mean of (z_s - z_t)^2 / 2: every image's part of it."""
    return correlation_errors(s, t, eps) / (2 * s.size)


def correlation_gradient(s: np.ndarray, t: np.ndarray, eps: float, upstream: float) -> np.ndarray:
    """d(upstream * V)/ds: through z_s = (x - mean) / (std + eps) the derivative e of V for z_s becomes, of each of the M values of a
    channel, (e - mean(e)) / (std + eps) - (x - mean) * sum(e (x - mean)) / ((M - 1) std (std + eps)^2), its last part 0 where std is."""
    slopes = upstream * (_standardised(s, eps) - _standardised(t, eps)) / s.size
    out = np.zeros(s.shape)
    for c in range(s.shape[1]):
        x, e = s[:, c].reshape(-1).tolist(), slopes[:, c].reshape(-1).tolist()
        mean, deviation = _moments(x)
        of_mean = math.fsum(e) / len(e)
        through = math.fsum(slope * (value - mean) for slope, value in zip(e, x, strict=True))
        factor = through / ((len(x) - 1) * deviation * (deviation + eps) ** 2) if deviation > 0 else 0.0
        made = zeros(len(x))
        for i, (value, slope) in enumerate(zip(x, e, strict=True)):
            made[i] = (slope - of_mean) / (deviation + eps) - (value - mean) * factor
        out[:, c] = np.array(made).reshape(s[:, c].shape)
    return out
