"""Channel means, weighted channel sums, attention and weighted imitation of one level, with gradients."""

from __future__ import annotations

import math

import numpy as np

from .numeric import array, sign, zeros


def channel_mean(x: np.ndarray, mode: str) -> np.ndarray:
    """(N, C): mean over (H, W) of x ("signed") or |x| ("abs")."""
    count, channels, height, width = x.shape
    values, out = x.tolist(), zeros(count, channels)
    for n in range(count):
        for c in range(channels):
            total = 0.0
            for h in range(height):
                for w in range(width):
                    total += abs(values[n][c][h][w]) if mode == "abs" else values[n][c][h][w]
            out[n][c] = total / (height * width)
    return array(out, count, channels)


def channel_mean_gradient(x: np.ndarray, mode: str, upstream: np.ndarray) -> np.ndarray:
    """d(sum upstream * channel_mean)/dx."""
    count, channels, height, width = x.shape
    values, up, out = x.tolist(), upstream.tolist(), zeros(count, channels, height, width)
    for n in range(count):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    slope = sign(values[n][c][h][w]) if mode == "abs" else 1.0
                    out[n][c][h][w] = slope * up[n][c] / (height * width)
    return array(out, *x.shape)


def _weight(w: list, n: int, c: int, h: int, v: int) -> float:
    entry = w[n][c]
    return entry[h][v] if isinstance(entry, list) else entry


def _raw_sum(x: list, w: list, n: int, h: int, v: int, activation: str) -> float:
    total = 0.0
    for c in range(len(x[n])):
        a = x[n][c][h][v]
        total += _weight(w, n, c, h, v) * (abs(a) if activation == "abs" else a)
    return total


def weighted_channel_sum(x: np.ndarray, w: np.ndarray, activation: str, rectify: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """r = rectified sum_c w_c a_c of shape (N, H, W), and its minimum and maximum per image; w is (N, C) or (N, C, H, W)."""
    count, _, height, width = x.shape
    xs, ws = x.tolist(), w.tolist()
    out, low, high = zeros(count, height, width), zeros(count), zeros(count)
    for n in range(count):
        low[n], high[n] = math.inf, -math.inf
        for h in range(height):
            for v in range(width):
                raw = _raw_sum(xs, ws, n, h, v, activation)
                if rectify == "abs":
                    raw = abs(raw)
                elif rectify == "relu":
                    raw = max(raw, 0.0)
                out[n][h][v] = raw
                low[n], high[n] = min(low[n], raw), max(high[n], raw)
    return array(out, count, height, width), array(low, count), array(high, count)


def weighted_channel_sum_gradient(
    x: np.ndarray,
    w: np.ndarray,
    activation: str,
    rectify: str,
    d_map: np.ndarray,
    d_low: np.ndarray | None = None,
    d_high: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients to x and to w of sum(d_map * r) + sum(d_low * min r) + sum(d_high * max r); exact ties share equally."""
    count, channels, height, width = x.shape
    xs, ws, up = x.tolist(), w.tolist(), d_map.tolist()
    maps, low, high = weighted_channel_sum(x, w, activation, rectify)
    maps = maps.tolist()
    dx, dw = zeros(*x.shape), zeros(*w.shape)
    for n in range(count):
        cells = [(h, v) for h in range(height) for v in range(width)]
        lowest = [cell for cell in cells if maps[n][cell[0]][cell[1]] == low[n]]
        highest = [cell for cell in cells if maps[n][cell[0]][cell[1]] == high[n]]
        for h, v in cells:
            d = up[n][h][v]
            if d_low is not None and (h, v) in lowest:
                d += float(d_low[n]) / len(lowest)
            if d_high is not None and (h, v) in highest:
                d += float(d_high[n]) / len(highest)
            raw = _raw_sum(xs, ws, n, h, v, activation)
            if rectify == "abs":
                d *= sign(raw)
            elif rectify == "relu":
                d *= float(raw > 0)
            for c in range(channels):
                a = xs[n][c][h][v]
                slope, value = (sign(a), abs(a)) if activation == "abs" else (1.0, a)
                dx[n][c][h][v] += _weight(ws, n, c, h, v) * slope * d
                if w.ndim == 2:
                    dw[n][c] += value * d
                else:
                    dw[n][c][h][v] += value * d
    return array(dx, *x.shape), array(dw, *w.shape)


def _softmax(values: list[float], temperature: float) -> list[float]:
    top = max(values)
    powers = [math.exp((value - top) / temperature) for value in values]
    total = math.fsum(powers)
    return [power / total for power in powers]


def attention(x: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """S (N, H, W) = HW softmax(mean_c |x| / temp) and Ch (N, C) = C softmax(mean_hw |x| / temp)."""
    count, channels, height, width = x.shape
    values = x.tolist()
    spatial, channel = zeros(count, height, width), zeros(count, channels)
    for n in range(count):
        pixels = []
        for h in range(height):
            for w in range(width):
                pixels.append(math.fsum(abs(values[n][c][h][w]) for c in range(channels)) / channels)
        for i, p in enumerate(_softmax(pixels, temperature)):
            spatial[n][i // width][i % width] = height * width * p
        means = []
        for c in range(channels):
            means.append(math.fsum(abs(values[n][c][h][w]) for h in range(height) for w in range(width)) / (height * width))
        for c, p in enumerate(_softmax(means, temperature)):
            channel[n][c] = channels * p
    return array(spatial, count, height, width), array(channel, count, channels)


def attention_gradient(x: np.ndarray, temperature: float, d_spatial: np.ndarray, d_channel: np.ndarray) -> np.ndarray:
    """Gradient to x of sum(d_spatial * S) + sum(d_channel * Ch)."""
    count, channels, height, width = x.shape
    spatial, channel = attention(x, temperature)
    values, s, ch, u, v = x.tolist(), spatial.tolist(), channel.tolist(), d_spatial.tolist(), d_channel.tolist()
    out = zeros(*x.shape)
    size = height * width
    for n in range(count):
        mean_u = math.fsum(u[n][h][w] * s[n][h][w] for h in range(height) for w in range(width)) / size
        mean_v = math.fsum(v[n][c] * ch[n][c] for c in range(channels)) / channels
        for c in range(channels):
            from_channel = ch[n][c] * (v[n][c] - mean_v) / (temperature * size)
            for h in range(height):
                for w in range(width):
                    from_spatial = s[n][h][w] * (u[n][h][w] - mean_u) / (temperature * channels)
                    out[n][c][h][w] = sign(values[n][c][h][w]) * (from_spatial + from_channel)
    return array(out, *x.shape)


def feature_imitation(s: np.ndarray, t: np.ndarray, spatial: np.ndarray | None, channel: np.ndarray | None) -> np.ndarray:
    """(N,): sum over c, h, w of spatial * channel * (s - t)^2."""
    count, channels, height, width = s.shape
    out = zeros(count)
    for n in range(count):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    out[n] += _factor(spatial, channel, n, c, h, w) * float(s[n, c, h, w] - t[n, c, h, w]) ** 2
    return array(out, count)


def feature_imitation_gradient(
    s: np.ndarray, t: np.ndarray, spatial: np.ndarray | None, channel: np.ndarray | None, upstream: np.ndarray
) -> np.ndarray:
    """Gradient to s of sum_n upstream_n * feature_imitation_n; the one to t is its negative."""
    count, channels, height, width = s.shape
    out = zeros(*s.shape)
    for n in range(count):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    factor = _factor(spatial, channel, n, c, h, w)
                    out[n][c][h][w] = 2.0 * float(upstream[n]) * factor * float(s[n, c, h, w] - t[n, c, h, w])
    return array(out, *s.shape)


def _factor(spatial: np.ndarray | None, channel: np.ndarray | None, n: int, c: int, h: int, w: int) -> float:
    factor = 1.0
    if spatial is not None:
        factor *= float(spatial[n, h, w])
    if channel is not None:
        factor *= float(channel[n, c])
    return factor
