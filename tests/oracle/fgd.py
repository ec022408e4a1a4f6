"""FGD (methods.md 6.5), the Gmask and Emask variants (2.4), and the CAM variants (2.4)."""

from __future__ import annotations

import math

import numpy as np

from . import boxes as box_oracle
from . import gkd, maps
from .gc_block import Parameters, block
from .layers import Level, pairs, size
from .primitives import attention
from .tape import Real, Rows, constants, exp, mean, square, total

CAM = gkd.GKD(channel_weight="abs", activation="abs", rectify="relu", eps=1e-7, eps_mode="absolute", average="n", box_weight="sqrt_mask")


def soft(values: list, size_: int, temperature: float) -> list:
    """size * softmax(values / temperature)."""
    powers = [exp(value / temperature) for value in values]
    whole = total(powers)
    return [power / whole * size_ for power in powers]


def attention_rows(s: Level, t: Level, temperature: float) -> list:
    """sum |Ch_S - Ch_T| + sum |S_S - S_T| of each image (methods.md 2.3)."""
    count, channels, height, width = size(s)
    spatial, channel = (x.tolist() for x in attention(np.asarray(constants(t)), temperature))
    rows = []
    for n in range(count):
        pixels = [mean([abs(s[n][c][h][w]) for c in range(channels)]) for h in range(height) for w in range(width)]
        means = [mean([abs(value) for row in plane for value in row]) for plane in s[n]]
        wanted = [value for row in spatial[n] for value in row]
        apart = [abs(a - b) for a, b in zip(soft(pixels, height * width, temperature), wanted, strict=True)]
        apart += [abs(a - b) for a, b in zip(soft(means, channels, temperature), channel[n], strict=True)]
        rows.append(total(apart))
    return rows


def relation_rows(s: Level, t: Level, of_student: Parameters, of_teacher: Parameters) -> list:
    """|| GcB_S(s) - GcB_T(t) ||^2 of each image."""
    x, y = block(s, of_student), block(t, of_teacher)
    return [total([square(d) for _, _, _, d in pairs(x, y, n)]) for n in range(len(s))]


def _weighted(s: Level, t: Level, mask, spatial, channel, n: int) -> Real | float:
    return total([square(d) * (mask[n][h][w] * spatial[n][h][w] * channel[n][c]) for c, h, w, d in pairs(s, t, n)])


def terms(
    s: list[Level],
    t: list[Level],
    blocks: list[tuple[Parameters, Parameters]] | None,
    boxes: list[np.ndarray],
    image_size: tuple[int, int],
    alpha: float,
    beta: float,
    gamma: float,
    lambda_: float,
    temperature: float = 0.5,
    mask: str = "area",
) -> dict[str, Rows]:
    """Terms with a coefficient of 0 are left out; blocks: the student's and the teacher's GcBlock of each level."""
    masks = box_oracle.box_mask(boxes, image_size, [size(x)[2:] for x in t], mask)
    found: dict[str, Rows] = {"foreground": [], "background": [], "attention": [], "relation": []}
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        images = range(len(a))
        spatial, channel = (x.tolist() for x in attention(np.asarray(constants(b)), temperature))
        inside, outside = masks[level].tolist(), box_oracle.background(masks[level]).tolist()
        found["foreground"].append([_weighted(a, b, inside, spatial, channel, n) * (alpha / len(a)) for n in images])
        found["background"].append([_weighted(a, b, outside, spatial, channel, n) * (beta / len(a)) for n in images])
        found["attention"].append([x * (gamma / len(a)) for x in attention_rows(a, b, temperature)])
        if lambda_:
            found["relation"].append([x * (lambda_ / len(a)) for x in relation_rows(a, b, *blocks[level])])
    kept = {"foreground": alpha, "background": beta, "attention": gamma, "relation": lambda_}
    return {term: rows for term, rows in found.items() if kept[term]}


def _cam_rows(s: list[Level], t: list[Level], g_s, g_t, boxes, image_size, beta: float) -> Rows:
    """GKD's map distance, whose gradient is in closed form, as numbers of the student's."""
    x, y = ([np.asarray(constants(level)) for level in levels] for levels in (s, t))
    values = beta * gkd.map_value(x, y, g_s, g_t, CAM, boxes, image_size)
    slopes = gkd.map_gradient(x, y, g_s, g_t, np.full(values.shape, beta), CAM, boxes, image_size)
    rows = []
    for level, own in enumerate(s):
        row = []
        for n, image in enumerate(own):
            leaves = [value for plane in image for line in plane for value in line]
            row.append(Real(float(values[level, n]), leaves, slopes[level][n].reshape(-1).tolist()))
        rows.append(row)
    return rows


def cam_terms(
    s: list[Level],
    t: list[Level],
    blocks: list[tuple[Parameters, Parameters]] | None,
    g_s: list[np.ndarray],
    g_t: list[np.ndarray],
    boxes: list[np.ndarray],
    image_size: tuple[int, int],
    variant: str,
    alpha: float,
    beta: float,
    gamma: float,
    lambda_: float,
    temperature: float = 0.5,
    compared: list[Level] | None = None,
) -> dict[str, Rows]:
    """variant: "both" weighs the features of each by the root of its own CAM and adds the CAMs' distance; "teacher" by the teacher's.

    compared: the student's features in the teacher's channels, where its own, of which the CAMs are, have others.
    """
    masks = box_oracle.box_mask(boxes, image_size, [size(x)[2:] for x in t], "gaussian")
    found: dict[str, Rows] = {"foreground": [], "attention": [], "relation": []}
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        teacher = np.asarray(constants(b))
        spatial, channel = (x.tolist() for x in attention(teacher, temperature))
        of_teacher = maps.normalised(gkd.raw_map(teacher, g_t[level], CAM), CAM.map_options)
        of_student = of_teacher
        if variant == "both":
            of_student = maps.normalised(gkd.raw_map(np.asarray(constants(a)), g_s[level], CAM), CAM.map_options)
        a = a if compared is None else compared[level]
        row = []
        for n in range(len(a)):
            parts = []
            for c in range(len(b[n])):
                for h in range(len(b[n][c])):
                    for w in range(len(b[n][c][h])):
                        factor = float(masks[level][n, h, w]) * spatial[n][h][w] * channel[n][c]
                        apart = a[n][c][h][w] * math.sqrt(of_student[n, h, w]) - b[n][c][h][w] * math.sqrt(of_teacher[n, h, w])
                        parts.append(square(apart) * factor)
            row.append(total(parts) * (alpha / len(a)))
        found["foreground"].append(row)
        found["attention"].append([x * (gamma / len(a)) for x in attention_rows(a, b, temperature)])
        if lambda_:
            found["relation"].append([x * (lambda_ / len(a)) for x in relation_rows(a, b, *blocks[level])])
    kept = {"foreground": alpha, "attention": gamma, "relation": lambda_}
    found = {term: rows for term, rows in found.items() if kept[term]}
    if variant == "both" and beta:
        found["cam"] = _cam_rows(s, t, g_s, g_t, boxes, image_size, beta)
    return found
