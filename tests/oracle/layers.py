"""Layers as loops over one level, x[n][c][h][w] of numbers (floats or tape.Real): convolutions, pooling, normalisations, resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .maps import bilinear_taps
from .tape import Number, dot, largest, mean, relu, root, square, total

Level = list[list[list[list[Number]]]]


def size(x: Level) -> tuple[int, int, int, int]:
    """N, C, H, W."""
    return len(x), len(x[0]), len(x[0][0]), len(x[0][0][0])


def each(function: Callable[[Number], Number], x: Level) -> Level:
    return [[[[function(value) for value in row] for row in plane] for plane in image] for image in x]


def pairs(x: Level, y: Level, n: int) -> list[tuple[int, int, int, Number]]:
    """(c, h, w, x - y) of image n."""
    _, channels, height, width = size(x)
    return [(c, h, w, x[n][c][h][w] - y[n][c][h][w]) for c in range(channels) for h in range(height) for w in range(width)]


def conv2d(x: Level, weight: list, bias: list | None = None) -> Level:
    """Stride 1, padded with zeros to the same size; weight[o][c][i][j], odd kernels."""
    count, channels, height, width = size(x)
    reach_h, reach_w = len(weight[0][0]) // 2, len(weight[0][0][0]) // 2
    out: Level = []
    for n in range(count):
        image = []
        for o, kernel in enumerate(weight):
            plane = []
            for h in range(height):
                row = []
                for w in range(width):
                    seen, factors = [], []
                    for c in range(channels):
                        for i in range(-reach_h, reach_h + 1):
                            for j in range(-reach_w, reach_w + 1):
                                if 0 <= h + i < height and 0 <= w + j < width:
                                    seen.append(x[n][c][h + i][w + j])
                                    factors.append(kernel[c][i + reach_h][j + reach_w])
                    value = dot(seen, factors)
                    row.append(value if bias is None else value + bias[o])
                plane.append(row)
            image.append(plane)
        out.append(image)
    return out


def conv_of(x: Level, parameters: dict[str, Any], name: str) -> Level:
    """The convolution whose parameters are `name`.weight and `name`.bias, if it has one."""
    return conv2d(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def linear(x: list[list[Number]], weight: list, bias: list | None = None) -> list[list[Number]]:
    """(N, C) -> (N, O); weight[o][c]."""
    return [[dot(row, kernel) + (0.0 if bias is None else bias[o]) for o, kernel in enumerate(weight)] for row in x]


def resized(x: Level, height: int, width: int) -> Level:
    """Bilinear, pixel centres at half-integers, borders clamped."""
    _, _, rows, columns = size(x)
    if (rows, columns) == (height, width):
        return x
    down = [bilinear_taps(i, height, rows) for i in range(height)]
    across = [bilinear_taps(j, width, columns) for j in range(width)]

    def at(plane: list, i: int, j: int) -> Number:
        (y0, y1, fy), (x0, x1, fx) = down[i], across[j]
        weights = [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx]
        return dot([plane[y0][x0], plane[y0][x1], plane[y1][x0], plane[y1][x1]], weights)

    return [[[[at(plane, i, j) for j in range(width)] for i in range(height)] for plane in image] for image in x]


def aligned(s: Level, t: Level, parameters: dict[str, Any], level: int, prefix: str = "", with_relu: bool = False) -> Level:
    """The student's level as the teacher's: the convolution `prefix`convolutions.`level`, if there is one, then its size."""
    name = f"{prefix}convolutions.{level}"
    if f"{name}.weight" in parameters:
        s = conv_of(s, parameters, name)
        s = each(relu, s) if with_relu else s
    return resized(s, *size(t)[2:])


def max_pool(x: Level, kernel: tuple[int, int]) -> Level:
    """Windows that do not overlap; what is left over at the right and below is dropped."""
    _, _, height, width = size(x)
    rows, columns = height // kernel[0], width // kernel[1]

    def window(plane: list, i: int, j: int) -> Number:
        return largest([plane[i * kernel[0] + a][j * kernel[1] + b] for a in range(kernel[0]) for b in range(kernel[1])])

    return [[[[window(plane, i, j) for j in range(columns)] for i in range(rows)] for plane in image] for image in x]


def batch_norm(x: Level, weight: list, bias: list, eps: float = 1e-5) -> Level:
    """Per channel over (N, H, W), as in training: biased variance of the batch."""
    count, channels, height, width = size(x)
    out: Level = [[[[0.0] * width for _ in range(height)] for _ in range(channels)] for _ in range(count)]
    for c in range(channels):
        values = [x[n][c][h][w] for n in range(count) for h in range(height) for w in range(width)]
        middle = mean(values)
        deviation = root(mean([square(value - middle) for value in values]) + eps)
        for n in range(count):
            for h in range(height):
                for w in range(width):
                    out[n][c][h][w] = (x[n][c][h][w] - middle) / deviation * weight[c] + bias[c]
    return out


def layer_norm(x: list[Number], weight: list, bias: list, eps: float = 1e-5) -> list[Number]:
    """Over a vector."""
    middle = mean(x)
    deviation = root(mean([square(value - middle) for value in x]) + eps)
    return [(value - middle) / deviation * weight[c] + bias[c] for c, value in enumerate(x)]


def channel_means(x: Level) -> list[list[Number]]:
    """(N, C): mean over h, w."""
    return [[mean([value for row in plane for value in row]) for plane in image] for image in x]


def pixel_means(x: Level) -> Level:
    """(N, 1, H, W): mean over c."""
    count, channels, height, width = size(x)
    return [[[[mean([x[n][c][h][w] for c in range(channels)]) for w in range(width)] for h in range(height)]] for n in range(count)]


def squares(x: Level, y: Level, n: int, weight: Callable[[int, int, int], float] | None = None) -> Number:
    """sum_{c,h,w} weight(c, h, w) (x - y)^2 of image n."""
    return total([square(d) if weight is None else square(d) * weight(c, h, w) for c, h, w, d in pairs(x, y, n)])


def norm(values: list[Number]) -> Number:
    """sqrt of the sum, 0 with derivative 0 where that is 0."""
    return root(total(values))


def biased_variance(x: Level) -> Number:
    """Of all numbers of a level."""
    values = [value for image in x for plane in image for row in plane for value in row]
    middle = mean(values)
    return mean([square(value - middle) for value in values])
