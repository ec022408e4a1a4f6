"""Normalised maps of one level, their distance and its gradient to the student's map."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from .numeric import array, sign, zeros

TINY64 = sys.float_info.min


@dataclass(frozen=True)
class Options:
    """How two maps are normalised and compared; the defaults are the "paper" preset's."""

    normalize: str = "minmax"
    distance: str = "l1"
    eps: float = 1e-6
    eps_mode: str = "relative"
    temperature: float = 0.5
    average: str = "nhw"
    tiny: float = TINY64


PAPER = Options()


def _denominator(scale: float, options: Options) -> tuple[float, float]:
    """D and k = dD/d(scale)."""
    if options.eps_mode == "relative":
        return scale * (1.0 + options.eps) + options.tiny, 1.0 + options.eps
    return scale + options.eps, 1.0


def normalise(r: list[list[float]], options: Options) -> list[list[float]]:
    """M of one image's map."""
    flat = [value for row in r for value in row]
    size, width = len(flat), len(r[0])
    if options.normalize == "none":
        out = flat
    elif options.normalize == "minmax":
        low, high = min(flat), max(flat)
        span = high - low
        if span == 0.0:
            out = [0.0] * size
        else:
            denominator, _ = _denominator(span, options)
            out = [(value - low) / denominator for value in flat]
    elif options.normalize == "softmax":
        top = max(flat)
        powers = [math.exp((value - top) / options.temperature) for value in flat]
        total = math.fsum(powers)
        out = [size * power / total for power in powers]
    else:
        mean, deviation = _moments(flat)
        if deviation == 0.0:
            out = [0.0] * size
        else:
            denominator, _ = _denominator(deviation, options)
            out = [(value - mean) / denominator for value in flat]
    return [out[i : i + width] for i in range(0, size, width)]


def _moments(flat: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (divided by the number of cells: a 1x1 level has one)."""
    if min(flat) == max(flat):
        return flat[0], 0.0
    mean = math.fsum(flat) / len(flat)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / len(flat))


def normalise_gradient(r: list[list[float]], e: list[list[float]], options: Options) -> list[list[float]]:
    """dr of one image from e = dL/dM."""
    flat, up = [value for row in r for value in row], [value for row in e for value in row]
    size, width = len(flat), len(r[0])
    cells = range(size)
    if options.normalize == "none":
        out = up
    elif options.normalize == "minmax":
        low, high = min(flat), max(flat)
        span = high - low
        out = [0.0] * size
        if span != 0.0:
            denominator, k = _denominator(span, options)
            total = math.fsum(up)
            moment = math.fsum(up[i] * (flat[i] - low) for i in cells)
            lowest, highest = [i for i in cells if flat[i] == low], [i for i in cells if flat[i] == high]
            out = [up[i] / denominator for i in cells]
            for i in highest:
                out[i] -= k * moment / denominator**2 / len(highest)
            for i in lowest:
                out[i] += (-total / denominator + k * moment / denominator**2) / len(lowest)
    elif options.normalize == "softmax":
        values = [value for row in normalise(r, options) for value in row]
        mean = math.fsum(up[i] * values[i] for i in cells) / size
        out = [values[i] * (up[i] - mean) / options.temperature for i in cells]
    else:
        mean, deviation = _moments(flat)
        out = [0.0] * size
        if deviation != 0.0:
            denominator, k = _denominator(deviation, options)
            mean_up = math.fsum(up) / size
            moment = math.fsum(up[i] * (flat[i] - mean) for i in cells)
            out = [(up[i] - mean_up) / denominator - k * moment / denominator**2 * (flat[i] - mean) / (size * deviation) for i in cells]
    return [out[i : i + width] for i in range(0, size, width)]


def bilinear_taps(i: int, new: int, old: int) -> tuple[int, int, float]:
    """The two old cells that the new cell i lies between, and how far it is from the first to the second."""
    position = max((i + 0.5) * old / new - 0.5, 0.0)
    first = min(math.floor(position), old - 1)
    return first, min(first + 1, old - 1), position - first


def resize(m: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear with pixel centres at half-integers and clamped borders."""
    rows, columns = len(m), len(m[0])
    if (rows, columns) == (height, width):
        return m
    out = zeros(height, width)
    for i in range(height):
        y0, y1, fy = bilinear_taps(i, height, rows)
        for j in range(width):
            x0, x1, fx = bilinear_taps(j, width, columns)
            upper = m[y0][x0] * (1 - fx) + m[y0][x1] * fx
            lower = m[y1][x0] * (1 - fx) + m[y1][x1] * fx
            out[i][j] = upper * (1 - fy) + lower * fy
    return out


def _distance(d: float, kind: str) -> tuple[float, float]:
    """Value and derivative of the distance at the difference d."""
    if kind == "l1":
        return abs(d), sign(d)
    if kind == "mse":
        return d * d, 2.0 * d
    return (0.5 * d * d, d) if abs(d) < 1.0 else (abs(d) - 0.5, sign(d))


def _compare(m_s: np.ndarray, m_t: np.ndarray, options: Options, spatial: np.ndarray | None, upstream: np.ndarray):
    count, height, width = m_s.shape
    values, gradients = zeros(count), zeros(count, height, width)
    divisor = count * height * width if options.average == "nhw" else count
    for n in range(count):
        student = normalise(m_s[n].tolist(), options)
        teacher = resize(normalise(m_t[n].tolist(), options), height, width)
        e = zeros(height, width)
        for h in range(height):
            for w in range(width):
                factor = 1.0 if spatial is None else float(spatial[n, h, w])
                value, slope = _distance(factor * student[h][w] - factor * teacher[h][w], options.distance)
                values[n] += value / divisor
                e[h][w] = float(upstream[n]) * factor * slope / divisor
        gradients[n] = normalise_gradient(m_s[n].tolist(), e, options)
    return array(values, count), array(gradients, count, height, width)


def map_distance(m_s: np.ndarray, m_t: np.ndarray, options: Options = PAPER, spatial: np.ndarray | None = None) -> np.ndarray:
    """(N,): distance of the two normalised maps (N, H, W), each multiplied by `spatial`, over N (and HW)."""
    return _compare(m_s, m_t, options, spatial, np.ones(len(m_s)))[0]


def map_distance_gradient(
    m_s: np.ndarray, m_t: np.ndarray, upstream: np.ndarray, options: Options = PAPER, spatial: np.ndarray | None = None
) -> np.ndarray:
    """Gradient to m_s of sum_n upstream_n * map_distance_n."""
    return _compare(m_s, m_t, options, spatial, upstream)[1]


def normalised(m: np.ndarray, options: Options = PAPER) -> np.ndarray:
    """Every image's map normalised, (N, H, W)."""
    return array([normalise(image.tolist(), options) for image in m], *m.shape)
